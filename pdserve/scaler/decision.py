"""What the scaler decides, and what it keeps of why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pdserve.core.endpoint import Role


class Speed(StrEnum):
    """What may be changed, the quickest and cheapest first."""

    BYPASS = "bypass"
    FLIP = "flip"
    SCALE = "scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetBypass:
    """Decode engines read prompts with fewer uncached tokens than this themselves. 0: as routing is configured."""

    below: int
    before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipRole:
    engine_id: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A pool is to have so many engines. victims: who should leave, the first first, if it has too many."""

    role: Role
    engines: int
    before: int
    victims: tuple[str, ...] = ()


Action = SetBypass | FlipRole | Scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another way to meet the need, and why it was not, or not only, taken."""

    speed: Speed
    what: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One action with its reasons. at: Unix seconds. rule: what settled it, of `assess.RULES` or the controller's own;
    inputs: the figures it rests on."""

    at: float
    action: Action
    rule: str
    reason: str
    inputs: Mapping[str, float] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()
    dry_run: bool = False

    @property
    def speed(self) -> Speed:
        match self.action:
            case SetBypass():
                return Speed.BYPASS
            case FlipRole():
                return Speed.FLIP
            case Scale():
                return Speed.SCALE

    @property
    def role(self) -> Role | None:
        """Of the pool that grows or shrinks, or gets an engine."""
        return None if isinstance(self.action, SetBypass) else self.action.role


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Engines of one pool as their owner has them. wanted: were asked for. ready: serve. warming: are being started and
    will serve; what waits for a machine that may never come does not count."""

    wanted: int = 0
    ready: int = 0
    warming: int = 0
