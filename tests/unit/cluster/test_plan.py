"""The supervisor's decisions in virtual time."""

from collections.abc import Callable
from itertools import count

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.cluster.member import Member, Phase
from pdserve.cluster.plan import (
    Action,
    BecameReady,
    Drain,
    Ended,
    Event,
    Flipped,
    GiveUp,
    Heard,
    Join,
    Kill,
    Paused,
    Retire,
    Return,
    Spawned,
    Start,
    Terminate,
    Tick,
    decide,
    endpoints,
    next_wakeup,
)
from pdserve.config.times import Times
from pdserve.core.endpoint import EngineState, Role

TIMES = Times(
    suspect=3.0, fence=4.0, gateway_fence=10.0, start_timeout=100.0, restart_backoff=0.5, restart_forgiven=60.0
)


class World:
    """Members under a clock the test moves; epochs count 1, 2, 3 …"""

    def __init__(self, **roles: Role | None) -> None:
        self.now = 1000.0
        self.members = {name: Member(id=name, role=role) for name, role in roles.items()}
        self.epochs = count(1)

    def happen(self, event: Event) -> list[Action]:
        self.members, actions = decide(self.members, event, self.now, TIMES, lambda: next(self.epochs))
        return actions

    def later(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.happen(Tick())

    def phase(self, name: str) -> Phase:
        return self.members[name].phase

    def bring_up(self, name: str) -> int:
        """Start a member that is due and make it ready; returns its epoch."""
        [start] = self.happen(Tick())
        assert isinstance(start, Start)
        assert start.id == name
        self.happen(Spawned(id=name, epoch=start.epoch, pid=start.epoch + 100))
        self.happen(BecameReady(id=name, epoch=start.epoch, address=f"host:{start.epoch}"))
        return start.epoch


def engine() -> World:
    return World(p=Role.PREFILL)


def test_everything_desired_is_started_at_once_and_only_once() -> None:
    world = World(p=Role.PREFILL, d=Role.DECODE, gateway=None)
    assert world.happen(Tick()) == [Start(id="p", epoch=1), Start(id="d", epoch=2), Start(id="gateway", epoch=3)]
    assert world.later(1) == []


def test_a_started_engine_is_published_with_its_state_and_a_gateway_never() -> None:
    world = World(p=Role.PREFILL, gateway=None)
    assert endpoints(world.members) == ()
    world.happen(Tick())
    [starting] = endpoints(world.members)
    assert (starting.state, starting.address) == (EngineState.STARTING, "")
    world.happen(Spawned(id="p", epoch=1, pid=7))
    world.happen(BecameReady(id="p", epoch=1, address="host:1"))
    [ready] = endpoints(world.members)
    assert (ready.state, ready.address, ready.pid, ready.epoch) == (EngineState.READY, "host:1", 7, 1)


def test_silence_makes_an_engine_suspect_and_then_gets_it_killed_once() -> None:
    world = engine()
    world.bring_up("p")
    assert world.later(2.9) == []
    assert world.phase("p") is Phase.READY
    assert world.later(0.1) == []
    assert world.phase("p") is Phase.SUSPECT
    assert world.later(1.0) == [Kill(id="p", epoch=1, reason="not heard of for 4 s")]
    assert world.later(50.0) == []


def test_a_late_heartbeat_clears_the_suspicion() -> None:
    world = engine()
    epoch = world.bring_up("p")
    world.later(3.5)
    world.happen(Heard(id="p", epoch=epoch))
    assert world.phase("p") is Phase.READY
    assert world.later(2.9) == []
    assert world.phase("p") is Phase.READY


def test_silence_past_the_fence_kills_even_if_no_tick_came_in_between() -> None:
    world = engine()
    world.bring_up("p")
    assert [type(action) for action in world.later(9.0)] == [Kill]


def test_the_supervisors_own_pause_is_nobodys_silence() -> None:
    world = engine()
    world.bring_up("p")
    world.now += 500.0
    world.happen(Paused(seconds=500.0))
    assert world.happen(Tick()) == []
    assert world.phase("p") is Phase.READY
    assert [type(action) for action in world.later(4.0)] == [Kill]


def test_a_silent_gateway_has_longer_than_an_engine() -> None:
    world = World(gateway=None)
    epoch = world.bring_up("gateway")
    assert world.later(9.9) == []
    assert world.phase("gateway") is Phase.SUSPECT
    world.happen(Heard(id="gateway", epoch=epoch))
    assert world.phase("gateway") is Phase.READY
    assert world.later(10.0) == [Kill(id="gateway", epoch=epoch, reason="not heard of for 10 s")]


def test_an_engine_that_never_becomes_ready_is_killed() -> None:
    world = engine()
    world.happen(Tick())
    assert world.later(99.9) == []
    assert world.later(0.1) == [Kill(id="p", epoch=1, reason="not ready for 100 s")]


def test_a_killed_engine_is_started_again_only_when_its_process_is_gone_and_under_a_new_epoch() -> None:
    world = engine()
    world.bring_up("p")
    world.later(4.0)
    assert world.later(500.0) == []
    world.happen(Ended(id="p", epoch=1, cause="killed by SIGKILL"))
    assert endpoints(world.members)[0].state is EngineState.DEAD
    assert world.later(0.4) == []
    assert world.later(0.1) == [Start(id="p", epoch=2)]


def test_repeated_deaths_wait_longer_and_a_long_life_starts_over() -> None:
    world = engine()
    delays = []
    for lived in (1.0, 1.0, 1.0, 61.0):
        epoch = world.bring_up("p")
        world.now += lived
        world.happen(Ended(id="p", epoch=epoch, cause="exited with code 1"))
        delays.append(world.members["p"].due - world.now)
        world.now = world.members["p"].due
    assert delays == [0.5, 1.0, 2.0, 0.5]


def test_events_of_an_earlier_incarnation_change_nothing() -> None:
    world = engine()
    old = world.bring_up("p")
    world.happen(Ended(id="p", epoch=old, cause="exited"))
    world.now += 1.0
    new = world.bring_up("p")
    before = dict(world.members)
    for event in (
        Heard(id="p", epoch=old),
        BecameReady(id="p", epoch=old, address="elsewhere"),
        Ended(id="p", epoch=old, cause="late"),
        Spawned(id="p", epoch=old, pid=1),
    ):
        assert world.happen(event) == []
    assert world.members == before
    assert new != old


def test_a_refusal_before_ever_working_ends_the_attempt() -> None:
    world = engine()
    world.happen(Tick())
    assert world.happen(Ended(id="p", epoch=1, cause="no config.json", refusal=True)) == [
        GiveUp(id="p", cause="no config.json")
    ]
    assert world.later(1000.0) == []


def test_a_refusal_of_an_engine_that_once_worked_is_a_death_like_any_other() -> None:
    world = engine()
    world.bring_up("p")
    world.happen(Ended(id="p", epoch=1, cause="exited"))
    world.later(0.5)
    assert world.happen(Ended(id="p", epoch=2, cause="disk is gone", refusal=True)) == []
    assert world.phase("p") is Phase.DOWN


def test_retired_members_drain_and_are_not_started_again() -> None:
    world = World(p=Role.PREFILL, d=Role.DECODE)
    world.happen(Tick())
    world.happen(BecameReady(id="p", epoch=1, address="host:1"))
    assert world.happen(Retire(ids=("p", "d"))) == [Terminate(id="p", epoch=1), Terminate(id="d", epoch=2)]
    assert [endpoint.state for endpoint in endpoints(world.members)] == [EngineState.DRAINING] * 2
    world.happen(Ended(id="p", epoch=1, cause="exited with code 0"))
    assert world.phase("p") is Phase.STOPPED
    assert [type(action) for action in world.later(1000.0)] == [Kill], "d does not end; nobody is started"
    assert world.happen(Retire(ids=("p", "d"))) == []


def test_a_member_waiting_for_its_restart_is_retired_at_once() -> None:
    world = engine()
    world.bring_up("p")
    world.happen(Ended(id="p", epoch=1, cause="exited"))
    assert world.happen(Retire(ids=("p",))) == []
    assert world.phase("p") is Phase.STOPPED
    assert world.later(1000.0) == []


def test_the_next_wakeup_is_when_something_would_be_decided() -> None:
    world = World(p=Role.PREFILL, gateway=None)
    world.happen(Tick())
    assert next_wakeup(world.members, TIMES) == world.now + 100.0
    world.happen(BecameReady(id="p", epoch=1, address="host:1"))
    assert next_wakeup(world.members, TIMES) == world.now + 3.0
    world.later(3.0)
    assert next_wakeup(world.members, TIMES) == world.now + 1.0
    assert next_wakeup({}, TIMES) is None


Step = tuple[str, float]


@settings(max_examples=150, deadline=None)
@example([("tick", 0.0), ("ready", 0.0), ("ready", 1.0), ("tick", 3.0)])
@given(
    st.lists(
        st.tuples(st.sampled_from(["spawned", "ready", "heard", "ended", "retire", "tick"]), st.floats(0, 6)),
        max_size=40,
    )
)
def test_whatever_happens_no_two_incarnations_of_a_member_live_at_once(steps: list[Step]) -> None:
    world = engine()
    alive: set[int] = set()
    heard_at: dict[int, float] = {}
    retired = False
    make: dict[str, Callable[[int], Event]] = {
        "spawned": lambda epoch: Spawned(id="p", epoch=epoch, pid=epoch),
        "ready": lambda epoch: BecameReady(id="p", epoch=epoch, address=f"host:{epoch}"),
        "heard": lambda epoch: Heard(id="p", epoch=epoch),
        "ended": lambda epoch: Ended(id="p", epoch=epoch, cause="exited"),
        "retire": lambda _: Retire(ids=("p",)),
        "tick": lambda _: Tick(),
    }
    for kind, wait in steps:
        world.now += wait
        epoch = world.members["p"].epoch
        if kind in ("spawned", "ready", "heard", "ended") and epoch not in alive:
            continue
        if kind in ("ready", "heard"):
            heard_at[epoch] = world.now
        for action in world.happen(make[kind](epoch)):
            if isinstance(action, Start):
                assert not alive
                assert not retired
                alive.add(action.epoch)
            if isinstance(action, Kill) and action.reason.startswith("not heard"):
                assert world.now - heard_at[action.epoch] >= TIMES.fence
        if kind == "ended":
            alive.discard(epoch)
        retired |= kind == "retire"


def test_a_drained_engine_returns_under_a_new_epoch_without_delay() -> None:
    world = engine()
    epoch = world.bring_up("p")
    assert world.happen(Drain(id="p", returns=True)) == [Terminate(id="p", epoch=epoch)]
    [draining] = endpoints(world.members)
    assert draining.state is EngineState.DRAINING
    world.happen(Ended(id="p", epoch=epoch, cause="exited with code 0"))
    assert world.phase("p") is Phase.DOWN
    assert world.members["p"].deaths == 0
    assert world.bring_up("p") == epoch + 1


def test_an_engine_drained_to_stay_away_returns_only_when_asked_to() -> None:
    world = engine()
    epoch = world.bring_up("p")
    world.happen(Drain(id="p", returns=False))
    world.happen(Ended(id="p", epoch=epoch, cause="exited with code 0"))
    assert world.phase("p") is Phase.STOPPED
    assert world.later(1000) == []
    assert world.happen(Drain(id="p", returns=True)) == []
    assert world.phase("p") is Phase.STOPPED
    world.happen(Return(id="p"))
    assert world.bring_up("p") == epoch + 1


def test_the_last_order_for_a_draining_engine_counts_and_shutdown_more_than_any() -> None:
    world = engine()
    epoch = world.bring_up("p")
    world.happen(Drain(id="p", returns=False))
    assert world.happen(Return(id="p")) == []
    assert world.members["p"].returns
    world.happen(Retire(ids=("p",)))
    world.happen(Ended(id="p", epoch=epoch, cause="exited with code 0"))
    assert world.phase("p") is Phase.STOPPED


def test_an_engine_that_does_not_end_draining_is_killed_and_keeps_its_order() -> None:
    world = engine()
    epoch = world.bring_up("p")
    world.happen(Drain(id="p", returns=False))
    assert next_wakeup(world.members, TIMES) == world.now + TIMES.drain_timeout + TIMES.fence
    [kill] = world.later(TIMES.drain_timeout + TIMES.fence)
    assert kill == Kill(id="p", epoch=epoch, reason="not drained for 30 s")
    world.happen(Ended(id="p", epoch=epoch, cause="killed by SIGKILL"))
    assert world.phase("p") is Phase.STOPPED


def test_an_engine_that_is_down_and_to_stay_away_is_not_started() -> None:
    world = engine()
    assert world.happen(Drain(id="p", returns=False)) == []
    assert world.phase("p") is Phase.STOPPED


def test_an_engine_that_joins_is_started_like_the_others() -> None:
    world = engine()
    world.bring_up("p")
    world.happen(Join(id="d", role=Role.DECODE))
    assert world.bring_up("d") == 2
    assert [(e.engine_id, e.role, e.state) for e in endpoints(world.members)] == [
        ("p", Role.PREFILL, EngineState.READY),
        ("d", Role.DECODE, EngineState.READY),
    ]


def test_an_engine_that_joins_and_refuses_its_input_is_tried_again_and_ends_nobody_else() -> None:
    world = engine()
    world.bring_up("p")
    world.happen(Join(id="d", role=Role.DECODE))
    world.happen(Tick())
    assert world.happen(Ended(id="d", epoch=2, cause="the disk is full", refusal=True)) == []
    assert (world.phase("p"), world.phase("d")) == (Phase.READY, Phase.DOWN)
    assert world.later(1.0) == [Start(id="d", epoch=3)]


def test_a_flipped_engine_keeps_its_incarnation_and_returns_in_its_new_role() -> None:
    world = engine()
    epoch = world.bring_up("p")
    assert world.happen(Flipped(id="p", role=Role.DECODE)) == []
    [endpoint] = endpoints(world.members)
    assert (endpoint.role, endpoint.epoch, endpoint.state) == (Role.DECODE, epoch, EngineState.READY)
    world.happen(Ended(id="p", epoch=epoch, cause="killed"))
    world.later(1.0)
    assert world.members["p"].role is Role.DECODE
