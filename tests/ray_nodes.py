"""Several Ray nodes on one machine, each on a loopback address of its own, for tests that lose some."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.contract.processes import descendants, is_gone

FAST_NODE_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
HEAD = "127.0.0.2"
START_TIMEOUT = 60.0
COMMON_OPTIONS = ["--disable-usage-stats", "--object-store-memory=80000000"]


class RayNodes:
    """A cluster of `ray start` nodes with one CPU each, on loopback addresses; HEAD starts before the others."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.token_file = directory / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32), encoding="ascii")
        self.env = {
            **os.environ,
            **FAST_NODE_DEATH,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with socket.create_server((HEAD, 0)) as gcs, socket.create_server((HEAD, 0)) as client:
            self._ports = gcs.getsockname()[1], client.getsockname()[1]
        self.address = f"{HEAD}:{self._ports[0]}"
        self._temporary = tempfile.mkdtemp(prefix="ray-nodes-", dir="/tmp")  # paths of sockets must be short
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, ip: str) -> None:
        """Start a node without waiting for it; `joined` does."""
        gcs, client = (str(port) for port in self._ports)
        join = [f"--address={self.address}"]
        if ip == HEAD:
            join = ["--head", f"--port={gcs}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
        # Nodes that share a folder number their sockets; two that start at once take the same number.
        temporary = f"--temp-dir={self._temporary}/{ip}"
        options = [*join, temporary, f"--node-ip-address={ip}", "--num-cpus=1", "--num-gpus=0"]
        with self._log(ip).open("wb") as output:
            self._nodes[ip] = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *COMMON_OPTIONS, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
            )

    def joined(self, ip: str) -> None:
        """Return once a node that was added is a member of the cluster."""
        deadline = time.monotonic() + START_TIMEOUT
        while "block forever" not in (said := self._log(ip).read_text(encoding="utf-8")):
            assert time.monotonic() < deadline, said
            assert self._nodes[ip].poll() is None, said
            time.sleep(0.1)

    def raylet(self, ip: str) -> int:
        """Process id of the node's raylet."""
        [found] = [pid for pid in descendants(self._nodes[ip].pid) if command_of(pid).endswith("/raylet")]
        return found

    def end(self, ip: str) -> None:
        node = self._nodes.pop(ip)
        started = descendants(node.pid)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
        assert all(is_gone(pid, within=5) for pid in started)

    def _log(self, ip: str) -> Path:
        return self.directory / f"{ip}.log"

    def close(self) -> None:
        for ip in reversed(list(self._nodes)):
            self.end(ip)
        shutil.rmtree(self._temporary, ignore_errors=True)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()


@contextmanager
def ray_nodes(directory: Path, *others: str) -> Iterator[RayNodes]:
    """The head and other nodes, all of them members of the cluster."""
    nodes = RayNodes(directory)
    try:
        nodes.add(HEAD)
        nodes.joined(HEAD)
        for ip in others:
            nodes.add(ip)
        for ip in others:
            nodes.joined(ip)
        yield nodes
    finally:
        nodes.close()
