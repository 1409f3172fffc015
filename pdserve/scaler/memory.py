"""What the scaler remembers between two decisions. Values that are never changed in place."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pdserve.core.endpoint import Role
from pdserve.scaler.demand import Demand, one_after_another
from pdserve.scaler.forecast import kept_bins
from pdserve.scaler.policy import Forecast, Policy

_HALF_LIFE = 120.0
"""Seconds after which a request counts half in what requests are like."""
_AS_PREDICTED = 60.0
"""Seconds of prompts that count as if they had taken what was predicted, until more were seen."""
_MOST_SLOWNESS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Fading sums over requests: what they are like. computed and busy: seconds that prompts which were computed should
    have taken, and that prefill engines were busy meanwhile."""

    prompts: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    ended: float = 0.0
    output_tokens: float = 0.0
    context_tokens: float = 0.0
    row_seconds: float = 0.0
    kv_token_seconds: float = 0.0
    computed: float = 0.0
    busy: float = 0.0

    def after(self, demand: Demand, before: Demand | None) -> "Likeness":
        """before: the report ahead of this one."""
        kept = 0.5 ** (demand.seconds / _HALF_LIFE)
        sent = sum(each.seconds for each in demand.prompts)
        computed, busy = _computed(sent, before, demand) if before else (0.0, 0.0)
        return Likeness(
            prompts=kept * self.prompts + sum(each.requests for each in demand.prompts),
            seconds=kept * self.seconds + sent,
            squares=kept * self.squares + sum(each.squares for each in demand.prompts),
            ended=kept * self.ended + demand.ended,
            output_tokens=kept * self.output_tokens + demand.output_tokens,
            context_tokens=kept * self.context_tokens + demand.context_tokens,
            row_seconds=kept * self.row_seconds + demand.row_seconds,
            kv_token_seconds=kept * self.kv_token_seconds + demand.kv_token_seconds,
            computed=kept * self.computed + computed,
            busy=kept * self.busy + busy,
        )

    @property
    def slowness(self) -> float:
        """By how much prompts keep engines busy longer than was predicted of them: their chunks may be smaller than a
        full step, and beside one another they take longer. At least 1, for busy time of the latest may be missing."""
        ratio = (self.busy + _AS_PREDICTED) / (max(0.0, self.computed) + _AS_PREDICTED)
        return min(_MOST_SLOWNESS, max(1.0, ratio))

    @property
    def mean_work(self) -> float:
        """Seconds of one engine a prompt takes."""
        return self.seconds / self.prompts if self.prompts else 0.0

    @property
    def work_deviation(self) -> float:
        if not self.prompts:
            return 0.0
        return float(max(0.0, self.squares / self.prompts - self.mean_work**2) ** 0.5)

    @property
    def output(self) -> float:
        """Tokens an answer has."""
        return self.output_tokens / self.ended if self.ended else 0.0

    @property
    def row_time(self) -> float:
        """Seconds an answer has a row of its engine."""
        return self.row_seconds / self.ended if self.ended else 0.0

    @property
    def kv_time(self) -> float:
        """The same times its KV in tokens: long prompts hold much for long, so it is more than the means' product."""
        return self.kv_token_seconds / self.ended if self.ended else 0.0

    @property
    def context(self) -> float:
        """Tokens a row of an answer reads, on average over its life."""
        return self.context_tokens / self.ended if self.ended else 0.0


def _computed(sent: float, before: Demand, demand: Demand) -> tuple[float, float]:
    """Between two reports: predicted seconds of the prompts that prefill engines computed, which are those sent but for
    what more stands in their queues, and seconds they were busy."""
    then, now = ({e.engine_id: e for e in told.engines if e.role is Role.PREFILL} for told in (before, demand))
    stood, stands = (sum(facts.backlog_seconds for facts in engines.values()) for engines in (then, now))
    busy = sum(max(0.0, now[name].busy_seconds - then[name].busy_seconds) for name in now if name in then)
    return sent + stood - stands, busy


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Arrivals per second by bin, oldest first, and the bin that is not over."""

    rates: tuple[float, ...] = ()
    arrivals: float = 0.0
    seconds: float = 0.0

    def after(self, demand: Demand, rule: Forecast) -> "Series":
        """A report belongs to the bin it begins in; one that spans several fills them evenly."""
        rates, arrivals, seconds = self.rates, self.arrivals + demand.arrivals, self.seconds + demand.seconds
        if seconds < rule.bin:
            return replace(self, arrivals=arrivals, seconds=seconds)
        whole = int(seconds / rule.bin)
        rates = (*rates, *([arrivals / seconds] * whole))[-kept_bins(rule) :]
        rest = seconds - whole * rule.bin
        return Series(rates=rates, arrivals=arrivals / seconds * rest, seconds=rest)

    @property
    def known(self) -> tuple[float, ...]:
        """With the bin that is not over where there is no other."""
        if self.rates or not self.seconds:
            return self.rates
        return (self.arrivals / self.seconds,)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMemory:
    """series: for its forecast. wanted: what was found right at which times (monotonic), for stabilisation. The others:
    when it changed last (monotonic)."""

    series: Series = Series()
    wanted: tuple[tuple[float, int], ...] = ()
    raised_at: float = float("-inf")
    lowered_at: float = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Times are monotonic seconds. busy_at: when there last was a request."""

    busy_at: float
    reports: tuple[tuple[float, Demand], ...] = ()
    likeness: Likeness = Likeness()
    pools: Mapping[Role, PoolMemory] = field(default_factory=dict)
    bypass: int = 0
    flipped_at: float = float("-inf")

    def pool(self, role: Role) -> PoolMemory:
        return self.pools.get(role, PoolMemory())

    @property
    def window(self) -> Demand:
        """The last policy.window seconds as one report."""
        return one_after_another(demand for _, demand in self.reports) or Demand(seconds=0.0)


def remember(memory: Memory, demand: Demand, policy: Policy, now: float) -> Memory:
    """The memory with one report more. now: monotonic seconds."""
    running = any(facts.running or facts.waiting for facts in demand.engines)
    busy = bool(demand.arrivals or demand.held or demand.knocking or running)
    pools = {
        role: replace(memory.pool(role), series=memory.pool(role).series.after(demand, pool.forecast))
        for role, pool in policy.pools.by_role().items()
    }
    return replace(
        memory,
        busy_at=now if busy else memory.busy_at,
        reports=(*((at, old) for at, old in memory.reports if at > now - policy.window), (now, demand)),
        likeness=memory.likeness.after(demand, memory.reports[-1][1] if memory.reports else None),
        pools=pools,
    )
