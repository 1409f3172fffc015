"""What the kernel says about the machine and about what this process has received, to tell which transport was used."""

import os
import socket
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pdserve.core.pair_check import MachineFacts, WireBytes

_PACKAGES = ("pdserve", "nixl-cu13", "nixl-cu12", "torch", "grpcio")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_INFINIBAND = Path("/sys/class/infiniband")
_TCP_INFO_BYTES = 256
_BYTES_RECEIVED = slice(128, 136)
"""tcpi_bytes_received in the kernel's struct tcp_info, since Linux 4.1."""
_RDMA_COUNTER_UNIT = 4
"""port_rcv_data counts words of four bytes."""


def machine_facts() -> MachineFacts:
    return MachineFacts(
        boot_id=_text(_BOOT_ID),
        versions=tuple((name, found) for name in _PACKAGES if (found := _version(name))),
        rdma_devices=tuple(sorted(path.name for path in _INFINIBAND.glob("*"))),
        cma_refused=_cma_refused(),
    )


def wire_bytes() -> WireBytes:
    """Sums over what is open now: a socket that closes takes its count along."""
    return WireBytes(tcp=sum(map(_tcp_received, os.listdir("/proc/self/fd"))), rdma=_rdma_received())


def _tcp_received(fd: str) -> int:
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            return 0
        with socket.socket(fileno=os.dup(int(fd))) as view:
            info = view.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return 0  # closed meanwhile, or no TCP socket
    return int.from_bytes(info[_BYTES_RECEIVED], "little")


def _rdma_received() -> int:
    total = 0
    for counter in _INFINIBAND.glob("*/ports/*/counters/port_rcv_data"):
        with suppress(OSError, ValueError):
            total += int(counter.read_text()) * _RDMA_COUNTER_UNIT
    return total


def _cma_refused() -> str:
    if _text(_PTRACE_SCOPE) in ("", "0") or _may_trace():
        return ""
    return f"{_PTRACE_SCOPE} is {_text(_PTRACE_SCOPE)} and this process lacks CAP_SYS_PTRACE"


def _may_trace() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 19 & 1)  # CAP_SYS_PTRACE
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
