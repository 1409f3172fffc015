"""One tenant floods the cluster: how much later do the answers of another begin, and what can either find out?

`python -m benchmarks.noisy_neighbour simulated`, `… real`: the quiet tenant's TTFT alone and beside the flood.
`… timing`: a tenant guesses, by how fast answers begin, which prompts another has just asked. docs/admission.md.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import structlog

from benchmarks.admission_load import Gun, Seen, Shape, Shot, as_arrivals, merged, p, seen_in, shots
from pdserve.config.load import load_config
from pdserve.core.admission import TenantRules
from pdserve.core.endpoint import Role
from pdserve.router.admission import AdmissionRules
from pdserve.simulator.profile import load_profile
from pdserve.simulator.simulation import Simulation, SimulationSpec
from pdserve_loadgen.client import Client
from pdserve_loadgen.endpoint import Api, Endpoint, Exchange
from pdserve_loadgen.prompts import words_of
from tests.deployment import Deployment, deployed, write_config

QUIET, NOISY = "quiet", "noisy"
SIMULATED = {
    "h200-8b": (Shape(input=1500, output=60), 10.0, 90.0, 20.0, (2.0, 0.05)),
    "demo-cpu": (Shape(input=300, output=12, longest=1500), 7.0, 70.0, 30.0, (2.0, 0.1)),
}
"""Shape of all requests, rates of the quiet tenant and of the flood, seconds, (TTFT, TPOT) targets."""
REAL = Shape(input=600, output=12, longest=1500)
REAL_SECONDS, REAL_SLO = 80.0, (2.0, 0.2)
QUIET_SHARE, FLOOD = 0.2, 3.0
"""Rates of both as parts of what the cluster can do."""
PROBES = 1000
PROBE_TOKENS = 160


def simulated(name: str) -> dict[str, Any]:
    shape, rate, flood, seconds, (ttft, tpot) = SIMULATED[name]
    spec = SimulationSpec(
        profile=load_profile(name),
        engines={Role.PREFILL: 2, Role.DECODE: 2},
        admission=AdmissionRules(ttft=ttft, tpot=tpot),
        tenants={QUIET: TenantRules(), NOISY: TenantRules()},
        block_size=64,
    )
    quiet = list(shots(shape, rate, seconds, 1, QUIET))
    noisy = list(shots(shape, flood, seconds, 1, NOISY))
    alone, both = (seen_in(Simulation(spec).run(as_arrivals(plan)).requests) for plan in (quiet, merged(quiet, noisy)))
    return {"rates": {QUIET: rate, NOISY: flood}, **compared(alone, both)}


def compared(alone: list[Seen], both: list[Seen]) -> dict[str, Any]:
    """Of the quiet tenant's requests."""
    beside = [each for each in both if each.tenant == QUIET]
    noisy = [each for each in both if each.tenant == NOISY]
    percentiles = {
        name: {f"p{percent}": p((each.ttft for each in seen), percent) for percent in (50, 90, 99)}
        for name, seen in (("alone", alone), ("beside", beside))
    }
    result = {
        "ttft": percentiles,
        "ttft_p99_ratio": (percentiles["beside"]["p99"] or 0) / (percentiles["alone"]["p99"] or 1),
        "requests": len(alone),
        "refused_or_failed": {
            "alone": sum(each.error is not None for each in alone),
            "beside": sum(each.error is not None for each in beside),
        },
        "noisy": {"requests": len(noisy), "served": sum(each.error is None for each in noisy)},
    }
    print(json.dumps(result), flush=True)
    return result


@contextmanager
def two_tenants(slo: tuple[float, float]) -> Iterator[tuple[Deployment, tuple[str, ...]]]:
    """A deployment with both as tenants, whose keys are their names' digests, and words of one token."""
    with TemporaryDirectory() as folder:
        keys = {name: f"sha256:{sha256(key_of(name).encode()).hexdigest()}" for name in (QUIET, NOISY)}
        settings = {
            "device": "cpu",
            "pools": {"prefill": {"engines": 1}, "decode": {"engines": 1}},
            "slo": {"ttft": slo[0], "tpot": slo[1]},
            "tenants": [{"name": name, "keys": [key]} for name, key in keys.items()],
        }
        path = write_config(Path(folder) / "cluster.yaml", settings)
        words = words_of(load_config(path, env={}).model_path / "tokenizer.json")
        with deployed(Path(folder) / "log", str(path)) as deployment:
            yield deployment, words


def key_of(tenant: str) -> str:
    return f"pd-benchmark-key-of-{tenant}"


def client_of(tenant: str, deployment: Deployment) -> Client:
    extra = {"ignore_eos": True, "temperature": 0}
    endpoint = Endpoint(
        url=deployment.url,
        model="pdserve-demo",
        api=Api.COMPLETIONS,
        api_key=key_of(tenant),
        extra=extra,
        timeout=60,
    )
    return Client(endpoint, time.perf_counter)


async def real() -> dict[str, Any]:
    with two_tenants(REAL_SLO) as (deployment, words):
        clients = {name: client_of(name, deployment) for name in (QUIET, NOISY)}
        gun = Gun(clients | {"default": clients[QUIET]}, words)
        try:
            capacity = await gun.capacity(REAL, 12.0, 8, seed=77)
            rate = QUIET_SHARE * capacity
            plan = list(shots(REAL, rate, REAL_SECONDS, 1, QUIET))
            alone = await gun.fire(plan)
            again = [Shot(s.at, s.tenant, s.input, s.output, s.number + 10_000) for s in plan]
            flood = shots(REAL, FLOOD * capacity, REAL_SECONDS, 1, NOISY)
            both = await gun.fire(merged(again, flood))
        finally:
            for client in clients.values():
                await client.close()
    rates = {QUIET: rate, NOISY: FLOOD * capacity}
    return {"closed_loop_per_second": capacity, "rates": rates, **compared(alone, both)}


async def timing() -> dict[str, Any]:
    """Half of the attacker's prompts were asked by the victim right before. The area under the curve tells how well it
    sees which: 0.5 is chance. The same by the victim itself shows what there would be to see."""
    with two_tenants((10.0, 1.0)) as (deployment, words):
        victim, attacker = (client_of(name, deployment) for name in (QUIET, NOISY))
        rng, numbers = Random(3), count()

        async def first_token(client: Client, text: str) -> float:
            answer = await client.send(Exchange((text,)), 1, f"probe-{next(numbers)}")
            if answer.error or not answer.token_times:
                raise RuntimeError(f"a probe failed: {answer.error}")
            return answer.token_times[0] - answer.sent

        async def probe(client: Client, probes: int) -> float:
            asked, fresh = [], []
            for _ in range(probes):
                secret, other = (" ".join(rng.choices(words, k=PROBE_TOKENS)) for _ in range(2))
                await first_token(victim, secret)
                is_asked = rng.random() < 0.5
                (asked if is_asked else fresh).append(await first_token(client, secret if is_asked else other))
            return auc(asked, fresh)

        try:
            return {
                "probes": PROBES,
                "attacker_auc": await probe(attacker, PROBES),
                "own_auc": await probe(victim, 100),
            }
        finally:
            await victim.close()
            await attacker.close()


def auc(asked: list[float], fresh: list[float]) -> float:
    """Likelihood that an answer to what was asked before begins sooner than one to something new, or the reverse."""
    wins = sum((a < b) + 0.5 * (a == b) for a in asked for b in fresh) / (len(asked) * len(fresh))
    return max(wins, 1 - wins)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("simulated", "real", "timing"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    load = os.getloadavg()[0]
    if arguments.kind == "simulated":
        outcome = {name: simulated(name) for name in SIMULATED}
    else:
        outcome = asyncio.run(real() if arguments.kind == "real" else timing())
    print(json.dumps(outcome, indent=1))
    result = {"benchmark": "noisy_neighbour", "kind": arguments.kind, "load_average": load, "result": outcome}
    out = arguments.out or Path(__file__).parent / "results" / f"noisy_neighbour_{arguments.kind}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
