"""From what a check of a pair found to what an operator should do about it: pure."""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.core.errors import DigestMismatch, LayoutMismatch, LinkLost, StaleEpoch, TransferTimeout, Unavailable
from pdserve.core.pair_check import MachineFacts, PairCheck, Transport

CLOCK_TOLERANCE = 0.1
"""Seconds two wall clocks may differ before the times in requests' records mislead."""

_NETWORK_BACKENDS = frozenset(("grpc", "gloo"))
"""They carry bytes over TCP by their nature: what is to be mended is why nothing better was usable."""


class Level(StrEnum):
    """FAILURE: requests suffer, exit code 1. WARNING: they are served, but not as well or as visibly as could be."""

    FAILURE = "failure"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong, and what to do."""

    level: Level
    what: str
    advice: str


_ADVICE = {
    DigestMismatch.code: "bytes are damaged on the way: take the pair out of service and test memory, cables and NIC "
    "firmware; kv.backends can name another backend meanwhile",
    LayoutMismatch.code: "start both engines with the same model directory, dtype and kv.block_size",
    LinkLost.code: "check that the target can reach the source's address and port: listening address (network), "
    "firewall, routes",
    StaleEpoch.code: "an engine restarted during the check: run it again",
    TransferTimeout.code: "the source is frozen, or the transport loses packets: look at its log, and at MTU and "
    "flow control of the network; its blocks stay quarantined until the read ends",
    Unavailable.code: "every KV block is in use: run the check again when there is less load, or raise kv.memory",
}
_OTHER_ADVICE = "both engines' logs have the details; kv.backends can name other backends"


def diagnose(check: PairCheck) -> list[Finding]:
    """Failures first; empty when all is well."""
    findings = []
    if check.error:
        code, message = check.error
        findings.append(Finding(level=Level.FAILURE, what=message, advice=_ADVICE.get(code, _OTHER_ADVICE)))
    if check.transport is Transport.TCP:
        findings.append(_over_tcp(check))
    if check.source_facts and check.target_facts:
        findings += _versions(check.source_facts, check.target_facts)
    if check.clock_offset is not None and abs(check.clock_offset) > CLOCK_TOLERANCE:
        what = f"the clock of {check.source} is {check.clock_offset:+.2f} s from that of {check.target}"
        findings.append(Finding(level=Level.WARNING, what=what, advice="synchronise them with NTP or PTP"))
    return sorted(findings, key=lambda finding: list(Level).index(finding.level))


def _over_tcp(check: PairCheck) -> Finding:
    """TCP where there is better is a failure; where there is nothing better, still worth saying."""
    source, target = check.source_facts, check.target_facts
    what = f"KV goes over TCP (backend {check.backend})"
    if source and target and source.boot_id == target.boot_id:
        refused = source.cma_refused or target.cma_refused
        reason = f": {refused}" if refused else ""
        advice = (
            f"both engines are on one machine, where the kernel can copy directly{reason}; let them share user and PID "
            "namespace, set kernel.yama.ptrace_scope=0 or grant CAP_SYS_PTRACE, and leave UCX_TLS unset; or put "
            "shared_memory first in kv.backends"
        )
        return Finding(level=Level.FAILURE, what=what, advice=advice)
    if source and target and source.rdma_devices and target.rdma_devices:
        devices = ", ".join(dict.fromkeys((*source.rdma_devices, *target.rdma_devices)))
        advice = (
            f"both machines have RDMA devices ({devices}): make /dev/infiniband visible to the engines, raise the "
            "memlock limit, leave UCX_TLS and UCX_NET_DEVICES unset or name these devices, and keep nixl in kv.backends"
        )
        return Finding(level=Level.FAILURE, what=what, advice=advice)
    advice = "no RDMA device is visible on both machines; if there are any, make /dev/infiniband visible to the engines"
    if check.backend not in _NETWORK_BACKENDS:
        return Finding(level=Level.WARNING, what=what, advice=advice)
    return Finding(level=Level.WARNING, what=what, advice=f"{advice}; install nixl to use them")


def _versions(source: MachineFacts, target: MachineFacts) -> list[Finding]:
    ours, theirs = dict(target.versions), dict(source.versions)
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if not differing:
        return []
    pairs = ", ".join(f"{name} {theirs.get(name, 'missing')} and {ours.get(name, 'missing')}" for name in differing)
    return [Finding(level=Level.WARNING, what=f"versions differ: {pairs}", advice="run one image on all engines")]
