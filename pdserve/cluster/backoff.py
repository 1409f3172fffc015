"""How long a process that keeps dying waits before it is started again."""

from pdserve.config.times import Times


def restart_delay(deaths: int, times: Times) -> float:
    """Seconds before the next start after this many deaths in a row (at least 1): doubling up to a maximum."""
    doublings = min(deaths - 1, 62)  # beyond, the maximum holds for any sane first delay
    return min(times.restart_backoff_max, times.restart_backoff * 2.0**doublings)


def deaths_in_a_row(before: int, lived: float, times: Times) -> int:
    """Count of this death, given the count before and the seconds the process had been ready."""
    return 1 if lived >= times.restart_forgiven else before + 1
