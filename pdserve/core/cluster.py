"""State and decisions of routing: inputs and outputs of pure functions, the same in cluster and simulator."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from pdserve.core.endpoint import Endpoint, EngineCapacity, LoadSnapshot
from pdserve.core.ticket import KVSource

EngineKey = tuple[str, int]
"""(engine id, epoch): one incarnation."""

Link = tuple[EngineKey, EngineKey]
"""(source, target): the line over which the target fetches KV, as a decode engine does from a prefill engine."""

RECENT_SECONDS = 30.0
"""Time constant with which EngineView.recent_work fades."""


OUTPUT_HORIZON = 256

FETCH_SECONDS = 0.005
"""What fetching a prefix from a peer takes beside its bytes: asking, digests of the first region, the release."""


def expected_output(max_tokens: int) -> int:
    """Output tokens to reckon with of a request that may write so many more: few write all they may, and how many
    one has written says little about how many are to come."""
    return min(max_tokens, OUTPUT_HORIZON)


class Mode(StrEnum):
    """Where prompt and tokens of a request are computed."""

    DISAGGREGATED = "disaggregated"
    DECODE_LOCAL = "decode_local"
    PREFILL_LOCAL = "prefill_local"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Seconds one engine step takes: base + per_token · tokens + per_context · context.

    tokens are those the step computes, context the tokens whose KV its rows read, themselves included.
    The defaults are a prior of the right order for a small model on a GPU, until steps have been seen.
    """

    base: float = 5e-3
    per_token: float = 4e-5
    per_context: float = 1e-8

    def seconds(self, tokens: float, context: float) -> float:
        return self.base + self.per_token * tokens + self.per_context * context


class BookedDecode(NamedTuple):
    """A request that writes its tokens on one engine: how many more are expected, and the prompt tokens whose KV
    every step reads for it."""

    expected_tokens: int
    context_tokens: int


class BookedPrompt(NamedTuple):
    """A prompt that was sent to an engine: how many of its tokens are to be computed, and since when (monotonic
    seconds)."""

    tokens: int
    since: float


class Share(NamedTuple):
    """One request's booking on one engine, as other routers are told of it. uncached_tokens: of its prompt, still to be
    computed there; 0 when that is done elsewhere or is over. prompt_tokens and left_tokens, which it may still write:
    0 for one that decodes elsewhere."""

    uncached_tokens: int
    prompt_tokens: int
    left_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Booked:
    """Work of this gateway, and of others that tell of theirs, that runs on one engine now.

    decoding: requests that write their tokens there, and reserved_tokens the KV they may grow to (prompt
    and expected output). prefilling: requests whose prompt the engine has yet to finish, and prompt_tokens
    their uncached tokens; behind_tokens are those of all but the oldest, of which the engine cannot have computed any;
    unseen are those its last snapshot cannot have counted yet, oldest first.
    A request that does both on one engine counts in decoding alone.
    """

    decoding: tuple[BookedDecode, ...] = ()
    reserved_tokens: int = 0
    prefilling: int = 0
    prompt_tokens: int = 0
    behind_tokens: int = 0
    unseen: tuple[BookedPrompt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine as the router knows it: its last snapshot plus what was booked since.

    load and capacity are None until the engine has sent them. load_at is when load arrived (monotonic
    seconds). others_requests: requests in the last snapshot that nobody known here had booked.
    recent_work: seconds of prompt computing booked there, fading with the time constant RECENT_SECONDS.
    kv_filled: share of its device pool that holds KV worth keeping, by its own events, at most 1: what it computes when
    that is full takes the place of other KV.
    lost_links: engines it should fetch no KV from now, because the link to them was lost. fetch_speeds: seconds per
    token its fetches from other engines take, where that was measured; handoff_speeds the same of handoffs.
    """

    endpoint: Endpoint
    load: LoadSnapshot | None
    load_at: float = 0.0
    capacity: EngineCapacity | None = None
    step_model: StepModel = StepModel()
    booked: Booked = Booked()
    others_requests: int = 0
    recent_work: float = 0.0
    kv_filled: float = 0.0
    lost_links: frozenset[EngineKey] = frozenset()
    fetch_speeds: Mapping[EngineKey, float] = field(default_factory=dict)
    handoff_speeds: Mapping[EngineKey, float] = field(default_factory=dict)
    key: EngineKey = field(init=False, repr=False, compare=False)
    domain: str = field(init=False, repr=False, compare=False)
    """As in EngineCapacity; empty, too, until it has told."""

    def __post_init__(self) -> None:
        # Kept, because a decision asks for them hundreds of times.
        object.__setattr__(self, "key", (self.endpoint.engine_id, self.endpoint.epoch))
        object.__setattr__(self, "domain", self.capacity.domain if self.capacity else "")

    @property
    def numerics(self) -> str:
        """As in EngineCapacity; empty, too, until it has told."""
        return self.capacity.numerics if self.capacity else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Everything a routing decision may look at. now is monotonic seconds. bypass_below: prompts with fewer uncached
    tokens than this are read by decode engines, because prefill is short; 0: as the rules say."""

    now: float
    engines: tuple[EngineView, ...]
    bypass_below: int = 0


class PrefixHit(NamedTuple):
    """Leading prompt tokens whose KV an engine holds: tokens by its own events, likely_tokens (never fewer)
    with those of prompts just dispatched there, which it is about to hold, and with what it held before events went
    missing. restored_tokens of them lie in a tier below
    its device pool; to bring them back takes it restore_seconds."""

    tokens: int = 0
    likely_tokens: int = 0
    restored_tokens: int = 0
    restore_seconds: float = 0.0

    @property
    def pool_tokens(self) -> int:
        """Those in the device pool. A pool keeps a beginning longest, so they lie before the others as a rule."""
        return self.tokens - self.restored_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAsk:
    """One request as a routing policy sees it. Engines without an entry in hits hold nothing of the prompt.

    prompt_name is the same for equal prompts: what else is equal may be settled by it (router.rendezvous).
    excluded incarnations must not be chosen: the request has just lost them. parted ones were the ends of a link
    it lost: they should take no part in another handoff of it, but may serve it alone. numerics is that of the engine
    whose tokens are to be continued, if there is one: others that round alike are preferred.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    prompt_name: bytes = b""
    hits: Mapping[EngineKey, PrefixHit] = field(default_factory=dict)
    excluded: frozenset[EngineKey] = frozenset()
    parted: frozenset[EngineKey] = frozenset()
    numerics: str = ""

    def uncached(self, key: EngineKey) -> int:
        """Prompt tokens the engine would have to compute or fetch; the last one always is computed."""
        hit = self.hits.get(key)
        return self.prompt_tokens - min(hit.likely_tokens, self.prompt_tokens - 1) if hit else self.prompt_tokens

    def expected(self, key: EngineKey) -> int:
        """Of the others, those of which the engine has not said that it holds them."""
        hit = self.hits.get(key)
        return self.prompt_tokens - self.uncached(key) - min(hit.tokens, self.prompt_tokens - 1) if hit else 0


class FetchPlan(NamedTuple):
    """KV of a prompt's first tokens (whole blocks) that the engine which computes the prompt fetches from a peer's
    cache: in so many seconds, those included in which the peer restores what lies in its tiers, where computing what
    it lacks of them would take saved_seconds."""

    source: KVSource
    tokens: int
    seconds: float
    saved_seconds: float


class Prediction(NamedTuple):
    """What the cost function expects of a candidate, in seconds.

    ttft from dispatch to first token, handoff_gap from first to second token beyond tpot, tpot per later
    token. cost is the one scalar candidates are compared by. fetch is part of the way where it makes that cheaper.
    """

    ttft: float
    handoff_gap: float
    tpot: float
    cost: float
    fetch: FetchPlan | None = None


class Candidate(NamedTuple):
    """One way a request could have gone; cost is in the routing policy's unit, lower is better."""

    prefill: str | None
    decode: str | None
    mode: Mode
    cost: float
    reason: str = ""
    prediction: Prediction | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The joint choice for one request. In a local mode both endpoints are the one engine.

    alternatives are the candidates that lost, cheapest first; reason says in words why this won.
    uncached_tokens is what the prompt-computing engine has to compute, fetch where it gets KV of the prompt's beginning
    if its own cache is not enough. prediction is None for policies that predict nothing. policy_error: the exception's
    class when the configured policy failed and kv_aware chose.
    """

    mode: Mode
    prefill: Endpoint
    decode: Endpoint
    reason: str
    alternatives: tuple[Candidate, ...] = ()
    uncached_tokens: int = 0
    prediction: Prediction | None = None
    fetch: FetchPlan | None = None
    policy_error: str = ""

    @property
    def link(self) -> Link:
        """Of a disaggregated route."""
        return (self.prefill.engine_id, self.prefill.epoch), (self.decode.engine_id, self.decode.epoch)

    @property
    def fetch_link(self) -> Link | None:
        """Over which the engine that computes the prompt fetches its beginning."""
        if self.fetch is None:
            return None
        source = self.fetch.source
        return (source.engine_id, source.epoch), (self.prefill.engine_id, self.prefill.epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Load booked on a route; released exactly once, when the request ends.

    uncached_tokens are computed on prefill until the first token; prompt_tokens and the expected of max_tokens
    occupy decode until the end.
    """

    request_id: str
    prefill: EngineKey
    decode: EngineKey
    prompt_tokens: int
    uncached_tokens: int
    max_tokens: int
