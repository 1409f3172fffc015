"""Engines as the rest of the cluster sees them."""

from dataclasses import dataclass
from enum import StrEnum
from secrets import randbits

from pdserve.core.tiers import TierTally


class Role(StrEnum):
    """What a pool is for. An engine's behaviour follows from EngineLimits, never from this name."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class EngineState(StrEnum):
    """STARTING → READY → DRAINING → DEAD; READY ↔ SUSPECT while heartbeats are late."""

    STARTING = "starting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


def new_epoch() -> int:
    """64 random bits naming one incarnation of an engine; compared only for equality, never 0."""
    return randbits(64) or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A routable engine."""

    engine_id: str
    role: Role
    epoch: int
    address: str
    """host:port of its gRPC server."""
    pid: int
    state: EngineState

    @property
    def key(self) -> tuple[str, int]:
        """Names this incarnation, as EngineKey."""
        return self.engine_id, self.epoch


LEASED_WATERMARK = 0.8
"""Share of an engine's blocks above which it begins no prompt that another engine is to take over: what is leased has
not been taken yet."""
_SPARE_SHARE = 8
_LENT_SHARE = 4


def most_lent(num_blocks: int) -> int:
    """Of a pool of so many blocks, those that an engine lends to others at a time."""
    return num_blocks // _LENT_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """Blocks of one device pool by state. A block has one state: quarantined > leased > used > free;
    unreferenced cached blocks are free. free + used + leased + quarantined = total, always."""

    total: int
    free: int
    used: int
    leased: int
    quarantined: int

    @property
    def spare(self) -> int:
        """Those that may be taken for a use that is no sequence's, as to restore what is then lent."""
        return self.free // _SPARE_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTally:
    """Sums over the steps of one size an engine has completed since it started, so that the difference of two
    snapshots tells what happened between them. context counts the tokens whose KV the rows read."""

    steps: int = 0
    tokens: int = 0
    context: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """Load of one engine, sent once per heartbeat and never from another epoch than it names.

    number counts up by one per engine and epoch. waiting includes fetching: sequences that have room, and wait for KV
    that is computed elsewhere or on its way. backlog_tokens are prompt tokens still to compute.
    """

    engine_id: str
    epoch: int
    number: int
    running: int
    waiting: int
    backlog_tokens: int
    blocks: BlockCounts
    draining: bool
    steps: tuple[StepTally, ...] = ()
    """By the bit length of a step's tokens: steps[n] tallies steps of 2**(n-1) to 2**n - 1 tokens."""
    tiers: tuple[TierTally, ...] = ()
    """Of each tier below the device pool, if there are any."""
    fetching: int = 0
    drain_cause: str = ""
    """Why it drains, if nobody told it to: "quarantine"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapacity:
    """What an engine tells of itself once, when a session begins. model_revision names the weights its block
    hashes are made for; max_len is the most tokens, prompt and output together, of a sequence (None: whatever its
    blocks hold); numerics as in ModelInfo; domain is the operator's name for the fast network it is on, empty where he
    gave none; the rest as in KVLayout and EngineLimits."""

    model_revision: str
    block_size: int
    num_blocks: int
    max_rows: int
    max_tokens_per_step: int
    prefix_caching: bool = True
    max_len: int | None = None
    numerics: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What makes an engine a prefill, decode or unified one.

    max_tokens_per_step bounds the tokens of a step, prefill chunks included; max_rows the sequences
    in a step; chunk_size the prompt tokens one sequence may take of one step. accepts_handoff lets
    it take tickets. depth is the number of steps in flight (1 or 2).
    """

    max_tokens_per_step: int = 512
    max_rows: int = 32
    chunk_size: int = 256
    max_model_len: int = 2048
    accepts_handoff: bool = True
    prefix_caching: bool = True
    depth: int = 2
