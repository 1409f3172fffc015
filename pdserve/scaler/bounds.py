"""What may come of a wish: bounds by the hour, stabilisation, cooldowns and steps, and budgets that pools share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from pdserve.core.endpoint import Role
from pdserve.scaler.memory import PoolMemory
from pdserve.scaler.policy import DAYS, PoolPolicy, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """least and most engines; rule says where they are from."""

    least: int
    most: int
    rule: str = "bounds"


def bounds_at(pool: PoolPolicy, unix: float, timezone: str) -> Bounds:
    """Of the first schedule that holds, else the pool's own."""
    local = datetime.fromtimestamp(unix, ZoneInfo(timezone))
    for schedule in pool.schedules:
        if _holds(schedule, local):
            least = pool.min if schedule.min is None else schedule.min
            most = pool.max if schedule.max is None else schedule.max
            return Bounds(least=least, most=most, rule="schedule")
    return Bounds(least=pool.min, most=pool.max)


def _holds(schedule: Schedule, local: datetime) -> bool:
    """A night belongs to the day it begins on."""
    clock = local.strftime("%H:%M")
    today = DAYS[local.weekday()] in schedule.days
    if schedule.start < schedule.end:
        return today and schedule.start <= clock < schedule.end
    yesterday = DAYS[(local - timedelta(days=1)).weekday()] in schedule.days
    return (today and clock >= schedule.start) or (yesterday and clock < schedule.end)


def note(memory: PoolMemory, pool: PoolPolicy, desired: int, current: int, now: float, keep: float) -> PoolMemory:
    """The memory with what was found right now; older than the longest window goes. keep: seconds, at least. Before
    anything was found, what is there was right."""
    window = max(pool.up.window, pool.down.window, keep)
    kept = tuple(entry for entry in memory.wanted or ((now, current),) if entry[0] > now - window)
    return replace(memory, wanted=(*kept, (now, desired)))


def most_wanted(memory: PoolMemory, seconds: float, now: float) -> int:
    """The most that was found right in the last so many seconds, the last time included."""
    return max(_wanted(memory, seconds, now))


def least_wanted(memory: PoolMemory, seconds: float, now: float) -> int:
    return min(_wanted(memory, seconds, now))


def _wanted(memory: PoolMemory, seconds: float, now: float) -> list[int]:
    return [memory.wanted[-1][1], *(count for at, count in memory.wanted if at > now - seconds)]


def paced(memory: PoolMemory, pool: PoolPolicy, current: int, now: float) -> tuple[int, str]:
    """How many engines the pool may go to now, and what held it back, if anything. memory includes the wish."""
    desired = memory.wanted[-1][1]
    up, down = pool.up, pool.down
    if desired > current:
        target = max(current, least_wanted(memory, up.window, now))
        if target == current:
            return current, "stabilisation"
        if now < memory.raised_at + up.cooldown:
            return current, "cooldown"
        limited = target if up.step is None else min(target, current + up.step)
        return limited, _held(limited, target, desired)
    if desired < current:
        target = min(current, most_wanted(memory, down.window, now))
        if target == current:
            return current, "stabilisation"
        if now < max(memory.lowered_at, memory.raised_at) + down.cooldown:
            return current, "cooldown"
        limited = target if down.step is None else max(target, current - down.step)
        return limited, _held(limited, target, desired)
    return current, ""


def _held(limited: int, target: int, desired: int) -> str:
    """Why it is less of a change than is wanted."""
    if limited != target:
        return "step"
    return "stabilisation" if target != desired else ""


def share(
    targets: Mapping[Role, int],
    needs: Mapping[Role, float],
    least: Mapping[Role, int],
    costs: Mapping[Role, float],
    budget: float,
) -> dict[Role, int]:
    """The targets cut until they cost no more than the budget, in the ratio of the needs: one engine at a time from the
    pool that has most for what it needs. No pool goes below its least."""
    cut = dict(targets)
    while sum(costs[role] * count for role, count in cut.items()) > budget + 1e-9:
        able = [role for role, count in cut.items() if count > least[role] and costs[role] > 0]
        if not able:
            break
        richest = max(able, key=lambda role: (cut[role] / max(needs[role], 0.1), role))
        cut[richest] -= 1
    return cut
