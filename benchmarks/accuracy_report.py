"""Routes and latencies of two runs of the same requests, side by side."""

from collections.abc import Mapping, Sequence
from itertools import permutations, product
from statistics import median
from typing import Any, NamedTuple

from pdserve.simulator.report import SimulatedRequest
from pdserve_loadgen.percentiles import Distribution
from pdserve_loadgen.result import RequestResult

LATENCIES = ("ttft", "tpot", "handoff_gap", "e2e")
PERCENTILES = ("p50", "p90", "p99")


class Pick(NamedTuple):
    """Where one request went; both names are one in a local mode."""

    prefill: str
    decode: str
    mode: str


def pick_of(route: Mapping[str, Any]) -> Pick:
    return Pick(route["prefill"], route["decode"], route["mode"])


def compared(
    places: Sequence[int],
    results: Mapping[int, RequestResult],
    records: Mapping[int, Mapping[str, Any]],
    simulated: Sequence[SimulatedRequest],
    would: Mapping[int, Pick],
) -> dict[str, Any]:
    """Of the requests at these places of the workload. would: the simulator's choices had it followed reality."""
    real = {place: pick_of(records[place]["route"]) for place in places}
    own = {place: simulated_pick(simulated[place]) for place in places}
    differing = [place for place in places if would[place] != real[place]]
    regrets = [regret for place in differing if (regret := _regret(records[place]["route"], would[place])) is not None]
    return {
        "routes": {
            "equal": _share(places, real, own),
            "equal_prefill": _share(places, real, own, "prefill"),
            "equal_decode": _share(places, real, own, "decode"),
            "equal_mode": _share(places, real, own, "mode"),
            "first_difference": next((n for n, place in enumerate(places) if real[place] != own[place]), None),
            "equal_up_to_names": _share_up_to_names(places, real, own),
            "equal_after_same_history": 1 - len(differing) / len(places),
            "median_extra_cost_of_differing": median(regrets) if regrets else None,
            "distinct_real_routes": len(set(real.values())),
        },
        "cached_share": {
            "real": _cached([records[place]["cached_tokens"] for place in places], places, results),
            "simulated": _cached([simulated[place].record.cached_tokens for place in places], places, results),
        },
        "latencies": {name: _latency(name, places, results, simulated) for name in LATENCIES},
        "picks": [" | ".join(" ".join(side[place]) for side in (real, own, would)) for place in places],
    }


def render(report: Mapping[str, Any]) -> str:
    routes = report["routes"]
    lines = [
        f"routes equal {routes['equal']:.1%} (prefill {routes['equal_prefill']:.1%}, "
        f"decode {routes['equal_decode']:.1%}, mode {routes['equal_mode']:.1%}; "
        f"up to engines' names {routes['equal_up_to_names']:.1%}); "
        f"after the same history {routes['equal_after_same_history']:.1%}",
        f"{'':<12}{'':<5}{'real ms':>9}{'simulated':>11}{'error':>8}",
    ]
    for name, rows in report["latencies"].items():
        for percentile, row in rows.items():
            lines.append(
                f"{name:<12}{percentile:<5}{row['real'] * 1e3:9.2f}{row['simulated'] * 1e3:11.2f}{row['error']:8.1%}"
            )
    return "\n".join(lines)


def simulated_pick(request: SimulatedRequest) -> Pick:
    route = request.record.route
    assert route
    return Pick(route.prefill.engine_id, route.decode.engine_id, route.mode.value)


def _share(places: Sequence[int], one: Mapping[int, Pick], other: Mapping[int, Pick], part: str = "") -> float:
    def same(place: int) -> bool:
        return getattr(one[place], part) == getattr(other[place], part) if part else one[place] == other[place]

    return sum(map(same, places)) / len(places)


def _share_up_to_names(places: Sequence[int], one: Mapping[int, Pick], other: Mapping[int, Pick]) -> float:
    """The share of equal routes when the other side's engines of each pool are renamed as suits best."""
    pools = [sorted({getattr(pick, part) for pick in (*one.values(), *other.values())}) for part in Pick._fields[:2]]

    def share(renamed: Mapping[str, str]) -> float:
        picks = {p: Pick(renamed[pick.prefill], renamed[pick.decode], pick.mode) for p, pick in other.items()}
        return _share(places, one, picks)

    return max(
        share({**dict(zip(pools[0], first, strict=True)), **dict(zip(pools[1], second, strict=True))})
        for first, second in product(*map(permutations, pools))
    )


def _regret(route: Mapping[str, Any], pick: Pick) -> float | None:
    """By what share the real router thought this way dearer than the one it took; None if it did not say."""
    for candidate in route["alternatives"]:
        engines = candidate["prefill"] or candidate["decode"], candidate["decode"] or candidate["prefill"]
        if Pick(*engines, candidate["mode"]) == pick:
            return float(candidate["cost"] / route["prediction"]["cost"] - 1)
    return None


def _cached(cached: Sequence[int], places: Sequence[int], results: Mapping[int, RequestResult]) -> float:
    return sum(cached) / sum(results[place].input_tokens for place in places)


def _latency(
    name: str, places: Sequence[int], results: Mapping[int, RequestResult], simulated: Sequence[SimulatedRequest]
) -> dict[str, dict[str, float]]:
    real, own = (
        Distribution.of(value for result in side if (value := getattr(result, name)) is not None)
        for side in ([results[place] for place in places], [simulated[place].result for place in places])
    )
    assert real
    assert own
    return {
        percentile: {
            "real": getattr(real, percentile),
            "simulated": getattr(own, percentile),
            "error": getattr(own, percentile) / getattr(real, percentile) - 1,
        }
        for percentile in PERCENTILES
    }
