"""How many engines a load needs, by the router's model of step times. Pure functions; times in seconds.

Prompts: engines are servers of one queue, M/G/n. The share of arrivals that wait is Erlang's C, and how long, that of
M/M/n times (1 + squared coefficient of variation) / 2 (Allen and Cunneen). So a request's wait counts in its TTFT, not
only its own work: a planner that leaves it out finds one engine enough for any load it can barely keep up with.

Tokens: by Little's law as many answers are there at a time as begin per second times how long they stay, and hold as
much KV; a step takes the longer the more there are.
"""

from dataclasses import dataclass
from math import ceil, exp, inf, log, sqrt
from statistics import NormalDist

from pdserve.core.cluster import StepModel

MOST_ENGINES = 1024
_LEAST_WAIT = 0.25
"""Share of the TTFT target that may be waited although a prompt alone takes longer than the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLoad:
    """rate: prompts per second. mean, deviation: of their work in seconds of one engine. own: work of the prompt at the
    objective's percentile. backlog: work that stands, beyond what is usual, to be gone in `recover`."""

    rate: float
    mean: float
    deviation: float
    own: float
    backlog: float = 0.0
    recover: float = 30.0

    @property
    def offered(self) -> float:
        """Engines that would be busy all the time."""
        return self.rate * self.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoad:
    """rate: answers per second that write output tokens each. context: tokens a row reads. row_seconds: how long an
    answer has a row; kv_token_seconds: times its KV in tokens. step: of the pool's engines, each with so much KV, in
    tokens, and so many rows."""

    rate: float
    output: float
    context: float
    row_seconds: float
    kv_token_seconds: float
    step: StepModel
    kv_tokens: int
    max_rows: int


def engines_for_prompts(load: PromptLoad, target: float, percentile: float) -> float:
    """The least number with which so many percent of first tokens come in time, whole but for what a backlog adds.
    MOST_ENGINES at most."""
    if load.rate <= 0 or load.mean <= 0:
        return load.backlog / load.recover
    allowed = max(target - load.own, _LEAST_WAIT * target)
    engines = ceil(load.offered + 1e-9)
    while engines < MOST_ENGINES and wait_percentile(load, engines, percentile) > allowed:
        engines += 1
    return min(MOST_ENGINES, max(engines, load.offered + load.backlog / load.recover))


def wait_percentile(load: PromptLoad, engines: int, percentile: float) -> float:
    """Seconds that so many percent of prompts wait at most; inf when they come faster than they are computed."""
    if engines <= load.offered:
        return inf
    waits = erlang_c(engines, load.offered)
    late = 1.0 - percentile / 100.0
    if waits <= late:
        return 0.0
    variation = (1.0 + (load.deviation / load.mean) ** 2) / 2.0
    return variation * load.mean * log(waits / late) / (engines - load.offered)


def erlang_c(servers: int, offered: float) -> float:
    """Share of arrivals that wait, in M/M/n with fewer busy servers than there are."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    used = offered / servers
    return blocked / (1.0 - used * (1.0 - blocked))


def engines_for_tokens(load: TokenLoad, tpot: float, kv_share: float) -> float:
    """The least number with which tokens come in time and rows and KV suffice, as a fraction: what answers need on
    average, and what chance adds. MOST_ENGINES at most."""
    if load.rate <= 0 or load.output <= 0:
        return 0.0
    slack = tpot - load.step.base
    if slack <= 0:
        return MOST_ENGINES
    per_row = load.step.per_token + load.step.per_context * load.context
    by_time = load.rate * load.output * tpot * per_row / slack
    running = load.rate * load.row_seconds
    chance = 1.0 + sqrt(2.0 / max(1.0, running))
    by_rows = chance * running / load.max_rows if load.max_rows else 0.0
    by_memory = chance * load.rate * load.kv_token_seconds / (load.kv_tokens * kv_share) if load.kv_tokens else 0.0
    return min(float(MOST_ENGINES), max(by_time, by_rows, by_memory))


def percentile_of(mean: float, deviation: float, percentile: float) -> float:
    """Of a log-normal distribution with this mean and deviation: lengths of prompts look like one."""
    if mean <= 0 or deviation <= 0:
        return mean
    spread = log(1.0 + (deviation / mean) ** 2)
    return exp(log(mean) - spread / 2 + NormalDist().inv_cdf(percentile / 100.0) * sqrt(spread))
