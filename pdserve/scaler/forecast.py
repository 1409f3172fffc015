"""Arrivals per second some time ahead, from those of past bins. Pure functions of a series."""

from collections.abc import Sequence

from pdserve.scaler.policy import Forecast

_DAMPING = 0.9
"""By how much a trend is believed less with each bin ahead (Gardner and McKenzie 1985): it does not go on for ever."""


def forecast(rates: Sequence[float], rule: Forecast, horizon: float) -> float:
    """rates: one per bin of rule.bin seconds, oldest first, without gaps. horizon: seconds ahead. Never negative; 0
    without a bin."""
    if not rates or rule.kind == "none":
        return 0.0
    if rule.kind == "last":
        return rates[-1]
    if rule.kind == "ewma":
        return _average(rates, _gain(rule.half_life, rule.bin))
    return max(0.0, _holt_winters(rates, rule, horizon))


def kept_bins(rule: Forecast) -> int:
    """How many bins a forecast can make use of."""
    if rule.kind == "holt_winters":
        return 2 * _season_bins(rule)
    return max(1, round(10 * rule.half_life / rule.bin))


def _average(rates: Sequence[float], gain: float) -> float:
    level = rates[0]
    for rate in rates[1:]:
        level += gain * (rate - level)
    return level


def _holt_winters(rates: Sequence[float], rule: Forecast, horizon: float) -> float:
    """Additive Holt-Winters with damped trend. The season begins as what the first one showed around its mean, so the
    level runs over the bins behind that; before a whole season was seen, there is none."""
    bins = _season_bins(rule)
    season = [0.0] * bins
    start = 0
    if len(rates) > bins:
        mean = sum(rates[:bins]) / bins
        season = [rate - mean for rate in rates[:bins]]
        start = bins
    level, trend = (rates[start] - season[start % bins]), 0.0
    level_gain, trend_gain = _gain(rule.half_life, rule.bin), _gain(rule.trend_half_life, rule.bin)
    for place in range(start + 1, len(rates)):
        rate, slot, before = rates[place], place % bins, level
        level += _DAMPING * trend
        level += level_gain * (rate - season[slot] - level)
        trend = _DAMPING * trend + trend_gain * (level - before - _DAMPING * trend)
        if start:
            season[slot] += rule.season_gain * (rate - level - season[slot])
    steps = max(0.0, horizon / rule.bin)
    ahead: float = _DAMPING * (1 - _DAMPING**steps) / (1 - _DAMPING)
    return level + trend * ahead + season[(len(rates) - 1 + round(steps)) % bins]


def _season_bins(rule: Forecast) -> int:
    return max(2, round(rule.season / rule.bin))


def _gain(half_life: float, bin_seconds: float) -> float:
    """Of an exponential average in which a bin counts half after half_life."""
    return 1.0 - float(0.5 ** (bin_seconds / half_life))
