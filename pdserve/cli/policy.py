"""`pdserve policy`: check a scaling policy, ask a running cluster why it has the engines it has, try a policy on a
trace."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from pdserve.cli.simulate import parse_engines
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError, PdserveError
from pdserve.router.admission import AdmissionRules
from pdserve.scaler.explain import explain_decision, in_words
from pdserve.scaler.load import load_policy
from pdserve.scaler.policy import Policy
from pdserve.simulator.profile import load_profile
from pdserve.simulator.report import SimulationReport
from pdserve.simulator.scaling import ScalingSpec
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve.simulator.workload import from_trace
from pdserve.telemetry.logs import only_errors
from pdserve_loadgen.errors import UsageError
from pdserve_loadgen.render import render
from pdserve_loadgen.slo import Slo
from pdserve_loadgen.traces import Scaling, read_trace

_WIDTH = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """The command line. engines: at the start, the policy's min of each pool when None. warm_up: the policy's when
    None."""

    policy: Path
    trace: Path
    scaling: Scaling
    engines: str | None
    profile: str
    kv_tokens: int | None
    warm_up: float | None
    seed: int


def replay(options: ReplayOptions) -> SimulationReport:
    """The trace on simulated engines that come and go by the policy. Raises ConfigError saying what is wrong."""
    policy = load_policy(options.policy)
    try:
        entries = read_trace(options.trace, options.scaling)
    except UsageError as error:
        raise ConfigError(str(error)) from None
    slo = policy.slo
    profile = load_profile(options.profile)
    pools = policy.pools.by_role()
    engines = parse_engines(options.engines) if options.engines else {role: max(1, p.min) for role, p in pools.items()}
    if engines.keys() != pools.keys():
        given = " and ".join(sorted(role.value for role in pools))
        raise ConfigError(f"--engines {options.engines}: the policy is one for {given}")
    warm_up = options.warm_up if options.warm_up is not None else max(pool.warm_up for pool in pools.values())
    spec = SimulationSpec(
        profile=profile,
        engines=engines,
        block_size=next((entry.block_tokens for entry in entries if entry.hash_ids), 16),
        kv_tokens=options.kv_tokens,
        seed=options.seed,
        admission=AdmissionRules(ttft=slo.ttft.seconds, tpot=slo.tpot.seconds),
        scaling=ScalingSpec(policy=policy, warm_up=warm_up),
    )
    with only_errors():
        return Simulation(spec).run(
            from_trace(entries, seed=options.seed),
            slo=Slo(ttft=slo.ttft.seconds, tpot=slo.tpot.seconds, attainment=_attainment(policy)),
            title=f"{options.trace.name} under {options.policy.name} on {profile.name}",
        )


def _attainment(policy: Policy) -> float:
    """Of requests that must meet both objectives."""
    return min(policy.slo.ttft.percentile, policy.slo.tpot.percentile) / 100


def replayed_json(report: SimulationReport) -> bytes:
    body = report.to_dict() | {
        "scaling": report.scaling.to_dict()
        | {"decisions": [explain_decision(decision) for decision in report.scaling.decisions]}
    }
    return orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n"


def render_replay(report: SimulationReport) -> str:
    """The load's table, the engines over time, what they cost and what was decided."""
    scaling = report.scaling
    lines = [render(report.load), ""]
    lines += [_timeline(report), ""]
    costs = ", ".join(f"{role.value} {seconds:.0f}" for role, seconds in scaling.engine_seconds.items())
    lines.append(f"engine-seconds: {scaling.total_seconds:.0f} ({costs}), until the last request came")
    lines.append("rules that fired: " + (", ".join(f"{n} × {rule}" for rule, n in scaling.rules().items()) or "none"))
    start = min((decision.at for decision in scaling.decisions), default=0.0)
    for decision in scaling.decisions:
        lines.append(f"  +{decision.at - start:6.1f} s  {in_words(decision)}  [{decision.rule}] {decision.reason}")
    return "\n".join(lines)


def _timeline(report: SimulationReport) -> str:
    """Engines that serve and that are asked for, whenever either changed."""
    table = Table(box=None, pad_edge=False)
    roles = [role for role in Role if any(moment.role is role for moment in report.scaling.timeline)]
    table.add_column("SECOND", justify="right")
    for role in roles:
        table.add_column(f"{role.value.upper()} READY/WANTED", justify="right")
    now: dict[Role, str] = {}
    rows: dict[int, dict[Role, str]] = {}
    for moment in report.scaling.timeline:
        now = {**now, moment.role: f"{moment.ready}/{moment.wanted}"}
        rows[round(moment.at)] = now
    shown: dict[Role, str] = {}
    for second, counts in rows.items():
        if counts != shown:
            table.add_row(str(second), *(counts.get(role, "") for role in roles))
            shown = counts
    return _printed(table)


def render_explanation(answer: bytes, latest: int) -> str:
    """What GET /admin/scaling answered, for people. Raises PdserveError when that is not ours."""
    try:
        body: dict[str, Any] = json.loads(answer)
        pools = Table(box=None, pad_edge=False)
        for title in ("POOL", "WANTED", "READY", "WARMING", "NEED", "DESIRED", "PRESSURE", "RULE", "HELD BY"):
            pools.add_column(title)
        for pool in body["pools"]:
            figures = [f"{pool[name]:.2f}" for name in ("need", "desired", "pressure")]
            counts = [str(pool[name]) for name in ("wanted", "ready", "warming")]
            pools.add_row(
                pool["role"], *counts, figures[0], str(pool["desired"]), figures[2], pool["rule"], pool["held"]
            )
        lines = [f"policy {body['policy']}{', dry run' if body['dry_run'] else ''}"]
        if body["refusal"]:
            lines.append(f"the file has changed and is refused; an earlier policy is in force:\n{body['refusal']}")
        if body["blind"]:
            lines.append(f"the pools cannot be seen, so nothing is decided: {body['blind']}")
        if body["latest_failure"]:
            lines.append(f"the latest change of a pool failed: {body['latest_failure']}")
        if body["failures"]:
            lines.append("failed so far: " + ", ".join(f"{n} × {code}" for code, n in body["failures"].items()))
        lines += [_printed(pools), ""]
        for decision in body["decisions"][-latest:]:
            lines += _decision(decision)
    except (ValueError, KeyError, TypeError):
        raise PdserveError("the answer is not about scaling; is this a pdserve gateway?") from None
    return "\n".join(lines if body["decisions"] else [*lines, "nothing was decided yet"])


def _decision(decision: dict[str, Any]) -> list[str]:
    when = datetime.fromtimestamp(decision["at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    would = "would: " if decision["dry_run"] else ""
    lines = [f"{when}  {would}{decision['what']}  [{decision['speed']}: {decision['rule']}] {decision['reason']}"]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in decision["inputs"].items())
    lines.append(f"    inputs: {figures}")
    lines += [f"    {each['speed']}: {each['what']}: {each['why']}" for each in decision["alternatives"]]
    return lines


def _printed(table: Table) -> str:
    text = StringIO()
    Console(file=text, width=_WIDTH, highlight=False, no_color=True).print(table)
    return text.getvalue().rstrip("\n")
