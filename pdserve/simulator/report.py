"""What a simulation yields: the load generator's report of the same run, and what only a simulator can see."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table

from pdserve.core.endpoint import BlockCounts, Role
from pdserve.simulator.scaling import ScalingReport
from pdserve.telemetry.record import RequestRecord
from pdserve_loadgen.render import WIDTH, render
from pdserve_loadgen.report import Report, RequestResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """One request: what its client saw, its tokens, and the product's own record of it."""

    result: RequestResult
    token_ids: tuple[int, ...]
    record: RequestRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUse:
    """One incarnation over the whole run. utilisation: share of the run in which a step was computed.

    uncached_tokens: prompt tokens of complete answers it computed. blocks: when the run had ended.
    """

    engine_id: str
    role: Role
    alive: bool
    steps: int
    tokens: int
    utilisation: float
    uncached_tokens: int
    blocks: BlockCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """prefix_hit_share: cached ÷ all prompt tokens of complete answers. imbalance: of uncached prompt tokens per
    prompt-computing engine, most ÷ mean. replays: attempts that failed and were made again elsewhere."""

    load: Report
    requests: tuple[SimulatedRequest, ...]
    engines: tuple[EngineUse, ...]
    prefix_hit_share: float
    imbalance: float
    replays: int
    scaling: ScalingReport

    def to_dict(self) -> dict[str, object]:
        """JSON-ready: the load generator's keys, and `simulation`. Never a prompt or an answer."""
        return {
            **self.load.to_dict(),
            "simulation": {
                "prefix_hit_share": self.prefix_hit_share,
                "imbalance": self.imbalance,
                "replays": self.replays,
                "engines": [asdict(use) for use in self.engines],
            },
        }

    def render(self) -> str:
        """The load generator's table, then the cluster's."""
        lines = [
            render(self.load),
            f"prefix hits {self.prefix_hit_share:.1%} of prompt tokens; imbalance {self.imbalance:.2f} "
            f"(most ÷ mean uncached prompt tokens per engine); {self.replays} replays",
            _table(self.engines),
        ]
        return "\n".join(lines)


def hit_share(requests: Sequence[SimulatedRequest]) -> float:
    prompt = sum(request.result.input_tokens for request in requests)
    return sum(request.record.cached_tokens for request in requests) / prompt if prompt else 0.0


def uncached_by_engine(requests: Sequence[SimulatedRequest]) -> Counter[tuple[str, int]]:
    """(engine id, epoch) → prompt tokens computed there."""
    work: Counter[tuple[str, int]] = Counter()
    for request in requests:
        trace = request.record.prefill_trace or request.record.decode_trace
        if trace:
            work[trace.engine_id, trace.epoch] += request.result.input_tokens - trace.cached_tokens
    return work


def imbalance_of(engines: Sequence[EngineUse]) -> float:
    """1 is even; 0 when no prompt was computed. Prompts are prefill engines' work, where there are any; an engine's
    incarnations count as one."""
    roles = {use.role for use in engines}
    loads: Counter[str] = Counter()
    for use in engines:
        if (use.role is Role.PREFILL) == (Role.PREFILL in roles):
            loads[use.engine_id] += use.uncached_tokens
    return max(loads.values()) * len(loads) / loads.total() if loads.total() else 0.0


def _table(engines: Sequence[EngineUse]) -> str:
    text = StringIO()
    table = Table(box=None, pad_edge=False)
    table.add_column("engine")
    for title in ("role", "busy", "steps", "tokens", "uncached", "KV blocks"):
        table.add_column(title, justify="right")
    for use in engines:
        name = use.engine_id if use.alive else f"{use.engine_id} (ended)"
        busy, counts = f"{use.utilisation:.1%}", (str(use.steps), str(use.tokens), str(use.uncached_tokens))
        table.add_row(name, use.role.value, busy, *counts, str(use.blocks.total))
    Console(file=text, width=WIDTH, highlight=False, no_color=True).print(table)
    return text.getvalue().rstrip("\n")
