"""The supervisor's decisions: members + event → members + actions. Pure, so tests own time and chance."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from pdserve.cluster.backoff import deaths_in_a_row, restart_delay
from pdserve.cluster.member import Member, Phase
from pdserve.config.times import Times
from pdserve.core.endpoint import Endpoint, Role

Members = dict[str, Member]
"""By id, in the order they were configured. Never changed in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """The process of an incarnation exists."""

    id: str
    epoch: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BecameReady:
    id: str
    epoch: int
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A sign of life from exactly this incarnation."""

    id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The process is gone. refusal: it said itself that the operator's input cannot work."""

    id: str
    epoch: int
    cause: str
    refusal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """The supervisor itself did not run for this many seconds (stopped, starved): nobody else's silence."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """These members are to drain and not to be started again."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """This member is to drain and end; then it stays away, or returns under a new epoch."""

    id: str
    returns: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Return:
    """A member that was drained is to be there again."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """An engine that did not exist is to be there from now on."""

    id: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Flipped:
    """An engine has taken another role, and has it when it returns, too."""

    id: str
    role: Role


Event = Spawned | BecameReady | Heard | Ended | Paused | Tick | Retire | Drain | Return | Join | Flipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate:
    """Ask it to drain and end."""

    id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Starting it again cannot help: a configured member that never worked refused its input."""

    id: str
    cause: str


Action = Start | Kill | Terminate | GiveUp


def decide(
    members: Members, event: Event, now: float, times: Times, new_epoch: Callable[[], int]
) -> tuple[Members, list[Action]]:
    """Apply an event. Events of another epoch than the member's are of the past and change nothing."""
    match event:
        case Tick():
            return _each(members, lambda member: _tick(member, now, times, new_epoch))
        case Paused():
            shift = event.seconds
            return {id: _shifted(member, shift) for id, member in members.items()}, []
        case Retire():
            return _each(members, lambda member: _retire(member, now) if member.id in event.ids else (member, []))
        case Drain():
            changed, actions = _drain(members[event.id], event, now)
            return {**members, event.id: changed}, actions
        case Return():
            return {**members, event.id: _return(members[event.id], now)}, []
        case Join() | Flipped():
            return {**members, event.id: _recruited(members.get(event.id), event, now)}, []
    member = members[event.id]
    if member.epoch != event.epoch:
        return members, []
    match event:
        case Spawned():
            changed, actions = replace(member, pid=event.pid), list[Action]()
        case BecameReady():
            changed, actions = _became_ready(member, event.address, now), []
        case Heard():
            phase = Phase.READY if member.phase is Phase.SUSPECT else member.phase
            changed, actions = replace(member, last_heard=now, phase=phase), []
        case Ended():
            changed, actions = _ended(member, event, now, times)
    return {**members, member.id: changed}, actions


def next_wakeup(members: Members, times: Times) -> float | None:
    """When a Tick would next decide something (monotonic seconds); None when only events can."""
    moments = [moment for member in members.values() if (moment := _deadline(member, times)) is not None]
    return min(moments, default=None)


def endpoints(members: Members) -> tuple[Endpoint, ...]:
    """The engines as gateways see them."""
    return tuple(endpoint for member in members.values() if (endpoint := member.endpoint()) is not None)


def _each(members: Members, rule: Callable[[Member], tuple[Member, list[Action]]]) -> tuple[Members, list[Action]]:
    results = {id: rule(member) for id, member in members.items()}
    return {id: member for id, (member, _) in results.items()}, [a for _, acts in results.values() for a in acts]


def _deadline(member: Member, times: Times) -> float | None:
    match member.phase:
        case Phase.DOWN:
            return member.due
        case Phase.STARTING:
            return member.since + times.start_timeout
        case Phase.READY:
            return member.last_heard + times.suspect
        case Phase.SUSPECT:
            return member.last_heard + _fence(member, times)
        case Phase.DRAINING if member.role is not None:
            return member.since + times.drain_timeout + times.fence
    return None


def _tick(member: Member, now: float, times: Times, new_epoch: Callable[[], int]) -> tuple[Member, list[Action]]:
    deadline = _deadline(member, times)
    if deadline is None or now < deadline:
        return member, []
    if member.phase is Phase.DOWN:
        epoch = new_epoch()
        started = replace(member, phase=Phase.STARTING, epoch=epoch, since=now, pid=0, address="", ready_since=None)
        return started, [Start(id=member.id, epoch=epoch)]
    if member.phase is Phase.READY:
        suspect = replace(member, phase=Phase.SUSPECT, since=now)
        return _tick(suspect, now, times, new_epoch)  # silent for so long that it is past the fence as well?
    if member.phase is Phase.DRAINING:
        reason = f"not drained for {times.drain_timeout:g} s"
        return replace(member, since=now), [Kill(id=member.id, epoch=member.epoch, reason=reason)]
    starting = member.phase is Phase.STARTING
    limit, what = (times.start_timeout, "ready") if starting else (_fence(member, times), "heard of")
    reason = f"not {what} for {limit:g} s"
    return replace(member, phase=Phase.KILLED, since=now), [Kill(id=member.id, epoch=member.epoch, reason=reason)]


def _fence(member: Member, times: Times) -> float:
    """Seconds of silence after which it is killed."""
    return times.gateway_fence if member.role is None else times.fence


def _shifted(member: Member, seconds: float) -> Member:
    return replace(member, last_heard=member.last_heard + seconds, since=member.since + seconds)


def _retire(member: Member, now: float) -> tuple[Member, list[Action]]:
    match member.phase:
        case Phase.DOWN:
            return replace(member, phase=Phase.STOPPED, since=now), []
        case Phase.STARTING | Phase.READY | Phase.SUSPECT:
            draining = replace(member, phase=Phase.DRAINING, since=now)
            return draining, [Terminate(id=member.id, epoch=member.epoch)]
        case Phase.KILLED:
            return replace(member, phase=Phase.DRAINING, since=now), []
    return replace(member, returns=False), []


def _drain(member: Member, event: Drain, now: float) -> tuple[Member, list[Action]]:
    retired, actions = _retire(member, now)
    if retired.phase is Phase.STOPPED and event.returns:
        return member, []
    return replace(retired, returns=event.returns), actions


def _return(member: Member, now: float) -> Member:
    match member.phase:
        case Phase.STOPPED:
            return replace(member, phase=Phase.DOWN, since=now, due=now, deaths=0)
        case Phase.DRAINING:
            return replace(member, returns=True)
    return member


def _recruited(member: Member | None, event: Join | Flipped, now: float) -> Member:
    if member is None:
        return Member(id=event.id, role=event.role, since=now, due=now, joined=True)
    return replace(member, role=event.role)


def _became_ready(member: Member, address: str, now: float) -> Member:
    if member.phase is not Phase.STARTING:
        return replace(member, address=address, last_heard=now)
    return replace(
        member, phase=Phase.READY, address=address, since=now, ready_since=now, last_heard=now, ever_ready=True
    )


def _ended(member: Member, event: Ended, now: float, times: Times) -> tuple[Member, list[Action]]:
    if member.phase is Phase.DRAINING and member.returns:
        return replace(member, phase=Phase.DOWN, since=now, due=now, returns=False), []
    if member.phase is Phase.DRAINING:
        return replace(member, phase=Phase.STOPPED, since=now), []
    if event.refusal and not (member.ever_ready or member.joined):
        return replace(member, phase=Phase.STOPPED, since=now), [GiveUp(id=member.id, cause=event.cause)]
    lived = now - member.ready_since if member.ready_since is not None else 0.0
    deaths = deaths_in_a_row(member.deaths, lived, times)
    due = now + restart_delay(deaths, times)
    return replace(member, phase=Phase.DOWN, since=now, deaths=deaths, due=due), []
