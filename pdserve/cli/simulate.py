"""`pdserve simulate`: a trace on a simulated cluster, reported like a load test."""

import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import orjson

from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError
from pdserve.simulator.profile import load_profile
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve.telemetry.logs import only_errors
from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.slo import Slo
from pdserve_loadgen.traces import Scaling, TraceEntry, read_trace

_ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}
_DEFAULT_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """The command line. block_size None: the trace's own, so that what it shares is found exactly."""

    trace: Path
    scaling: Scaling
    engines: str
    profile: str
    policy: str
    block_size: int | None
    kv_tokens: int | None
    seed: int
    slo: str | None


def simulate(options: SimulateOptions) -> SimulationReport:
    """Raises ConfigError saying which option or line is wrong."""
    try:
        entries = read_trace(options.trace, options.scaling)
        slo = Slo.parse(options.slo) if options.slo else None
    except UsageError as error:
        raise ConfigError(str(error)) from None
    spec = SimulationSpec(
        profile=load_profile(options.profile),
        engines=parse_engines(options.engines),
        block_size=options.block_size or _block_size(entries),
        kv_tokens=options.kv_tokens,
        seed=options.seed,
        policy=options.policy,
    )
    with only_errors():
        return Simulation(spec).run(
            from_trace(entries, seed=options.seed),
            slo=slo,
            title=f"{options.trace.name} on {options.engines} of {spec.profile.name}, {options.policy}",
        )


def to_json(report: SimulationReport) -> bytes:
    return orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2) + b"\n"


def parse_engines(text: str) -> dict[Role, int]:
    """`2p3d` or `4u`: a number and a letter per pool. Raises ConfigError."""
    parts = re.findall(r"(\d+)([pdu])", text)
    engines = {_ROLES[letter]: int(count) for count, letter in parts if int(count)}
    if "".join(chain.from_iterable(parts)) != text or not engines or len({p[1] for p in parts}) != len(parts):
        raise ConfigError(f"--engines {text!r}: write how many prefill, decode or unified engines, as 2p2d or 4u")
    if (Role.PREFILL in engines) != (Role.DECODE in engines):
        raise ConfigError(f"--engines {text!r}: prefill and decode engines need each other; u engines do both")
    return engines


def _block_size(entries: list[TraceEntry]) -> int:
    return next((entry.block_tokens for entry in entries if entry.hash_ids), _DEFAULT_BLOCK)
