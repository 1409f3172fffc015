"""How far chance alone moves routes: the accuracy run's workload, simulated with equal and with varying step times.

What is left of equality here bounds what the simulator can show against reality on a machine with such a spread.
"""

import argparse
import json
from pathlib import Path

from benchmarks.accuracy_report import simulated_pick
from benchmarks.conversation_trace import conversations
from benchmarks.simulator_accuracy import simulate
from pdserve.simulator.profile import PoolSteps, Profile
from pdserve.simulator.workload import from_trace

SPREADS = (0.1, 0.3)


def spread(profile: Profile, amount: float) -> Profile:
    steps = {role: cost.model_copy(update={"spread": amount}) for role, cost in profile.pool_steps if cost is not None}
    return profile.model_copy(update={"pool_steps": PoolSteps(**steps)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path, help="a result of benchmarks.simulator_accuracy")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    result = json.loads(args.profile.read_text(encoding="utf-8"))
    profile = Profile.model_validate(result["calibrated"]["from_the_run"]["profile"])
    for rate in args.rates:
        for seed in range(args.seeds):
            arrivals = list(from_trace(conversations(200, rate, seed), seed=seed))
            shares = []
            runs = [simulate(spread(profile, amount), arrivals, seed) for amount in (0.0, *SPREADS)]
            picks = [[simulated_pick(request) for request in requests] for requests in runs]
            for varied in picks[1:]:
                shares.append(sum(a == b for a, b in zip(picks[0], varied, strict=True)) / len(varied))
            told = ", ".join(f"spread {amount:g}: {share:.1%}" for amount, share in zip(SPREADS, shares, strict=True))
            print(f"{rate:g} requests/s, seed {seed}: {told}", flush=True)


if __name__ == "__main__":
    main()
