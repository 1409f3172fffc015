"""How soon a forecast sees a load that triples, and what it sees while nothing changes:
`python -m benchmarks.forecasts`.

Arrivals as in benchmarks.autoscaling: Poisson's, steady for 100 s, then within 60 s three times as many. What is
expected 50 s ahead, with the rate of the last 30 s as the least, as the scaler has it; in multiples of the first rate,
over 40 draws.
"""

import json
from pathlib import Path
from random import Random
from statistics import fmean, quantiles

from benchmarks.autoscaling import SHAPE, rate_at
from pdserve.scaler.forecast import forecast
from pdserve.scaler.policy import Forecast

RULES = {
    "holt_winters": Forecast(),
    "holt_winters, bin 5, half lives 10": Forecast(bin=5.0, half_life=10.0, trend_half_life=10.0),
}
RATES = (1.4, 2.4)
DRAWS, AHEAD, WINDOW = 40, 50.0, 30.0
STEADY = range(50, 105, 5)
RISING = (120, 130, 140, 150)


def arrivals(base: float, seed: int) -> list[float]:
    rng, at, times = Random(seed), 0.0, list[float]()
    most = base * max(max(first, last) for _, first, last in SHAPE)
    while at < max(RISING):
        at += rng.expovariate(most)
        if rng.random() * most < base * rate_at(at):
            times.append(at)
    return times


def expected(times: list[float], rule: Forecast, now: float) -> float:
    bins = [0] * int(now / rule.bin)
    for at in times:
        if at < len(bins) * rule.bin:
            bins[int(at / rule.bin)] += 1
    seen = sum(now - WINDOW <= at < now for at in times) / WINDOW
    return max(seen, forecast([count / rule.bin for count in bins], rule, AHEAD))


def main() -> None:
    result: dict[str, object] = {"benchmark": "forecasts", "draws": DRAWS, "ahead": AHEAD}
    for base in RATES:
        draws = [arrivals(base, seed) for seed in range(DRAWS)]
        for name, rule in RULES.items():
            steady = [expected(times, rule, now) / base for times in draws for now in STEADY]
            rising = {now: round(fmean(expected(times, rule, now) / base for times in draws), 2) for now in RISING}
            result[f"{name}, {base:g}/s"] = figures = {
                "steady_mean": round(fmean(steady), 2),
                "steady_p90": round(quantiles(steady, n=10)[-1], 2),
                "after_rise_began": {f"{now - 100} s": seen for now, seen in rising.items()},
            }
            print(f"{name}, {base:g}/s: {json.dumps(figures)}")
    path = Path(__file__).parent / "results" / "forecasts.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
