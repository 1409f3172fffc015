"""Rules of a policy that span several fields. Pure: a policy in, complaints out."""

from collections.abc import Iterator
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pdserve.core.endpoint import Role
from pdserve.scaler.policy import Policy, PoolPolicy

Complaint = tuple[str, str]
"""(dotted path of the field, what is wrong with it and what to do)."""


def complaints(policy: Policy) -> list[Complaint]:
    """One per broken rule; empty when all is well."""
    found = [*_whole(policy), *_sums(policy)]
    for role, pool in policy.pools.by_role().items():
        found += [(f"pools.{role}.{field}", why) for field, why in _pool(pool, policy)]
    return found


def _whole(policy: Policy) -> Iterator[Complaint]:
    pools = policy.pools
    if pools.unified and (pools.prefill or pools.decode):
        yield "pools.unified", "unified engines stand alone; give prefill and decode, or unified"
    elif not pools.unified and not (pools.prefill and pools.decode):
        yield "pools", "give prefill and decode, or unified alone"
    if policy.window < policy.interval:
        yield "window", f"must not be shorter than interval ({policy.interval:g})"
    try:
        ZoneInfo(policy.timezone)
    except (ZoneInfoNotFoundError, ValueError):
        yield "timezone", f"{policy.timezone!r} is no time zone, such as UTC or Europe/Berlin"
    if pools.unified and policy.flip.enabled:
        yield "flip.enabled", "there is no other role to flip to; set it to false"


def _sums(policy: Policy) -> Iterator[Complaint]:
    by_role = policy.pools.by_role()
    least = sum(pool.min for pool in by_role.values())
    if policy.total is not None and policy.total < least:
        yield "total", f"must not be less than what the pools have at least, together {least}"
    cost = sum(pool.min * pool.cost for pool in by_role.values())
    if policy.cost_ceiling is not None and policy.cost_ceiling < cost:
        yield "cost_ceiling", f"must not be less than what min of the pools costs, together {cost:g}"
    minima = {role: pool.min for role, pool in by_role.items() if role is not Role.UNIFIED}
    if len(set(map(bool, minima.values()))) > 1:
        yield "pools", "prefill and decode need each other; set min of both to 0, or of neither"


def _pool(pool: PoolPolicy, policy: Policy) -> Iterator[Complaint]:
    if pool.max < pool.min:
        yield "max", f"must not be less than min ({pool.min})"
    low, high = pool.reactive.dead_band
    if low >= high:
        yield "reactive.dead_band", f"must be [low, high] with low below high, not [{low:g}, {high:g}]"
    if pool.forecast.bin < policy.interval:
        yield "forecast.bin", f"must not be shorter than interval ({policy.interval:g})"
    if pool.forecast.season < 2 * pool.forecast.bin:
        yield "forecast.season", f"must be at least two bins of {pool.forecast.bin:g}"
    for place, schedule in enumerate(pool.schedules):
        field = f"schedules[{place}]"
        if schedule.min is None and schedule.max is None:
            yield field, "changes nothing; give min, max or both"
        least = pool.min if schedule.min is None else schedule.min
        most = pool.max if schedule.max is None else schedule.max
        if most < least:
            yield f"{field}.max", f"must not be less than min ({least}) in these hours"
