"""The scaling policy: every field of policies.yaml, its default and its range.

Durations are in seconds, rates per second, shares between 0 and 1. Rules that span several fields are in `checks`;
reading a file is in `load`. docs/autoscaling.md shows these fields with examples.
"""

from typing import Annotated, Literal

from pydantic import Field

from pdserve.config.section import NonEmpty, Section
from pdserve.core.endpoint import Role

Seconds = Annotated[float, Field(gt=0)]
Wait = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Engines = Annotated[int, Field(ge=0, le=512)]
Clock = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Objective(Section):
    """So much of the requests (percentile) has to do with at most so many seconds."""

    seconds: Seconds
    percentile: Annotated[float, Field(ge=50, lt=100)] = 95.0


class Objectives(Section):
    """What clients are promised. The scaler keeps a margin below it."""

    ttft: Objective = Objective(seconds=2.0)
    handoff_gap: Objective = Objective(seconds=0.5)
    tpot: Objective = Objective(seconds=0.1)


class Targets(Section):
    """What the reactive loop holds a pool to. A pool without a target is not judged by that signal."""

    slo: Share | None = 0.8
    """Percentiles should lie at this share of the objectives: TTFT for engines that read prompts, handoff gap and TPOT
    for those that write tokens."""
    backlog_seconds: Seconds | None = 1.0
    """Prompt work ahead of a new prompt: that of the engines with least of it, and its share of what the gate holds."""
    kv_occupancy: Share | None = 0.8
    """Share of KV blocks in use, of engines that write tokens."""
    queue: Annotated[float, Field(gt=0)] | None = 4.0
    """Requests that wait for a row or blocks, per engine."""


class Pace(Section):
    """How fast a pool may change in one direction."""

    step: Annotated[int, Field(ge=1, le=512)] | None = None
    """Engines at a time; without, as many as are wanted."""
    cooldown: Wait = 0.0
    """Between two changes in this direction."""
    window: Wait = 0.0
    """Stabilisation: the most cautious of what was wanted in this time counts."""


class Reactive(Section):
    """The fast loop above the forecast's floor: engines · (signal ÷ target), as horizontal autoscalers do."""

    dead_band: tuple[Wait, Seconds] = (0.6, 1.0)
    """Signal ÷ target between which nothing changes."""
    clamp: Annotated[float, Field(gt=1, le=10)] = 2.0
    """The most one decision may multiply a pool by."""
    warming_credit: Share = 1.0
    """How much of an engine that is starting counts as there."""


class Forecast(Section):
    """What the floor of a pool rests on: the arrivals expected when an engine asked for now would be ready.

    none: no floor but min. last: the latest bin goes on. ewma: an average that fades. holt_winters: level, damped trend
    and, once one season was seen, the season.
    """

    kind: Literal["none", "last", "ewma", "holt_winters"] = "holt_winters"
    bin: Seconds = 10.0
    half_life: Seconds = 30.0
    """Of the average, or of the level."""
    trend_half_life: Seconds = 40.0
    season: Seconds = 86400.0
    season_gain: Share = 0.3
    """How much of the latest season's difference is learned."""
    margin: Annotated[float, Field(ge=0, le=2)] = 0.1
    """Share that is added to what is expected."""
    recover: Seconds = 30.0
    """A backlog should be gone in this time."""


class Schedule(Section):
    """Other bounds at certain hours. Of several that hold, the first counts."""

    days: Annotated[tuple[Day, ...], Field(min_length=1)] = DAYS
    start: Clock
    end: Clock
    """Not after start: on the next day."""
    min: Engines | None = None
    max: Engines | None = None


class PoolPolicy(Section):
    """One pool. min 0 lets it sleep: see scale_to_zero."""

    min: Engines = 1
    max: Annotated[int, Field(ge=1, le=512)]
    warm_up: Seconds = 60.0
    """From asking for an engine until it serves; of the last ones what they took, as soon as that is known."""
    cost: Annotated[float, Field(ge=0)] = 1.0
    """Of one engine for an hour, in the unit of cost_ceiling."""
    targets: Targets = Targets()
    up: Pace = Pace()
    down: Pace = Pace(cooldown=30.0, window=120.0)
    reactive: Reactive = Reactive()
    forecast: Forecast = Forecast()
    schedules: tuple[Schedule, ...] = ()


class PoolPolicies(Section):
    """Prefill and decode, or unified alone."""

    prefill: PoolPolicy | None = None
    decode: PoolPolicy | None = None
    unified: PoolPolicy | None = None

    def by_role(self) -> dict[Role, PoolPolicy]:
        """Those that are given."""
        pools = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.UNIFIED: self.unified}
        return {role: pool for role, pool in pools.items() if pool is not None}


class Bypass(Section):
    """The fastest of the three: while prefill is short and decode is not, decode engines read short prompts themselves.
    It takes effect with the next request."""

    enabled: bool = True
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Prompts with fewer uncached tokens than this, at most."""


class Flip(Section):
    """The second: an engine of the pool that has some to spare takes the other role; weights and KV stay."""

    enabled: bool = False
    """Pools whose engines differ by more than their limits (ranks, prefix caching) cannot flip."""
    cooldown: Wait = 20.0
    """Between two flips."""
    spare_for: Wait = 15.0
    """An engine counts as one to spare after so long."""


class ScaleToZero(Section):
    """Pools with min 0 go to zero after so long without a request; the next request waits for them."""

    idle: Seconds = 600.0
    patience: Seconds = 300.0
    """How long a request waits for an engine to wake."""


class Policy(Section):
    """A whole policies.yaml."""

    interval: Annotated[float, Field(ge=0.5, le=300)] = 5.0
    """Between two decisions."""
    window: Seconds = 30.0
    """What signals are measured over."""
    dry_run: bool = False
    """Decide, note and change nothing."""
    timezone: NonEmpty = "UTC"
    """Of schedules, as Europe/Berlin."""
    slo: Objectives = Objectives()
    pools: PoolPolicies
    total: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Engines of all pools together; when more are wanted, pools share it in the ratio of what they need."""
    cost_ceiling: Annotated[float, Field(gt=0)] | None = None
    """Of all engines together for an hour; shared as total is."""
    bypass: Bypass = Bypass()
    flip: Flip = Flip()
    scale_to_zero: ScaleToZero = ScaleToZero()
