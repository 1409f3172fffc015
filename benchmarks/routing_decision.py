"""What the router costs: one decision among many engines, the KV index's memory, and KV events taken in.

A decision is what a gateway does between a request and its route: the state of all engines, the index, the policy, what
is noted for the next one. Engines are real ledgers with bookings, fed as sessions feed them; nothing is computed. Every
prompt has 32k tokens: a system prompt that all engines hold, and one of many conversations, each on a few. Before each
decision a tenth of the engines have sent tokens and one has told its load. Hashing is told apart, and so is processor
time, which says more on a machine that others use.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from pdserve.config.times import Times
from pdserve.core.blocks import BlockHash, KVEvent, KVEventKind, KVSnapshot, block_hashes, hash_namespace
from pdserve.core.clock import SystemClock
from pdserve.core.cluster import Route
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineCapacity, EngineState, LoadSnapshot, Role, StepTally
from pdserve.core.request import Request, SamplingParams
from pdserve.dispatch.booking import Booking
from pdserve.dispatch.ledger import EngineLedger
from pdserve.dispatch.sessions import Connection, SessionPool
from pdserve.router.kv_index import KVIndex
from pdserve.router.loading import load_policy
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules

BLOCK_SIZE = 16
PROMPT_TOKENS = 32_768
SYSTEM_TOKENS = 2048
CONVERSATIONS = 64
COLLECT_EVERY = 10_000
"""Objects, as a gateway sets it once it is set up."""
KEPT = 4
"""Bookings per engine that last at a time, on average."""
CAPACITY = EngineCapacity(
    model_revision="r1",
    block_size=BLOCK_SIZE,
    num_blocks=65_536,
    max_rows=256,
    max_tokens_per_step=8192,
    max_len=131_072,
)


class HeardFrom:
    """A connection to an engine that is well and is sent nothing."""

    usable = True
    failed = False

    def snapshot(self) -> None:
        return None

    async def close(self) -> None:
        return None


class Deployment:
    """A gateway's side of so many engines, half of them prefill and half decode."""

    def __init__(self, engines: int, policy: str, seed: int) -> None:
        self._rng = Random(seed)
        rules = RoutingRules()
        self.ledgers: list[tuple[EngineLedger, Endpoint]] = []
        self.pool = SessionPool(Times(), SystemClock(), self._connect)
        self.router = Router(load_policy(policy, rules), self.pool.index, rules)
        self.pool.update(tuple(_endpoint(number, engines) for number in range(engines)))
        self._numbers = dict.fromkeys((e.engine_id for _, e in self.ledgers), 0)
        for ledger, endpoint in self.ledgers:
            ledger.described(CAPACITY)
            ledger.kv_restored(KVSnapshot(number=0, hashes=(), first=True, last=True))
            for _ in range(2):
                self._tell_load(ledger, endpoint)
        self.prompts = [_prompt(self._rng, number) for number in range(CONVERSATIONS)]
        self._fill()
        self._lasting: deque[tuple[Route, Request, Booking]] = deque()

    def decide(self, number: int) -> tuple[float, float, float]:
        """Seconds of hashing one prompt, of the decision, and of this thread's processor during it."""
        request = replace(self._rng.choice(self.prompts), id=f"r{number}")
        self._meanwhile()
        begun = time.perf_counter()
        self.router.keep(request, self.router.prepare(request))
        hashed, busy = time.perf_counter(), time.thread_time()
        route = self.router.route(request, self.pool.state())
        busy, ended = time.thread_time() - busy, time.perf_counter()
        self._lasting.append((route, request, self.pool.book(request, route).__enter__()))
        while len(self._lasting) > KEPT * len(self.ledgers):
            self._lasting.popleft()[2].release()
        return hashed - begun, ended - hashed, busy

    def _meanwhile(self) -> None:
        for ledger, endpoint in self._rng.sample(self.ledgers, 1):
            self._tell_load(ledger, endpoint)
        told = self._rng.sample(range(len(self.ledgers)), len(self.ledgers) // 10)
        for at in told:
            self.ledgers[at][0].tokens_arrived("", 1)
        for route, request, _ in list(self._lasting)[-20:-19]:
            ledger = next(each for each, e in self.ledgers if e is route.prefill)
            ledger.tokens_arrived(request.id, 1)
            self._store(ledger, route.prefill, _chain(request))

    def _tell_load(self, ledger: EngineLedger, endpoint: Endpoint) -> None:
        self._numbers[endpoint.engine_id] = number = self._numbers.get(endpoint.engine_id, 0) + 1
        steps = 40 * number
        ledger.loaded(
            LoadSnapshot(
                engine_id=endpoint.engine_id,
                epoch=endpoint.epoch,
                number=number,
                running=KEPT,
                waiting=0,
                backlog_tokens=0,
                blocks=BlockCounts(total=65_536, free=60_000, used=5_536, leased=0, quarantined=0),
                draining=False,
                steps=(StepTally(steps=steps, tokens=steps * 16, context=steps * 4096, seconds=steps * 0.006),),
            )
        )

    def _fill(self) -> None:
        self._events = dict.fromkeys((e.engine_id for _, e in self.ledgers), 0)
        for ledger, endpoint in self.ledgers:
            self._store(ledger, endpoint, _chain(self.prompts[0])[: SYSTEM_TOKENS // BLOCK_SIZE])
        for prompt in self.prompts:
            chain = _chain(prompt)
            for ledger, endpoint in self._rng.sample(self.ledgers, 3):
                self._store(ledger, endpoint, chain[: self._rng.randrange(len(chain))])

    def _store(self, ledger: EngineLedger, endpoint: Endpoint, hashes: tuple[BlockHash, ...]) -> None:
        self._events[endpoint.engine_id] = number = self._events[endpoint.engine_id] + 1
        if not ledger.kv_changed([KVEvent(number=number, kind=KVEventKind.STORED, hashes=hashes)]):
            raise RuntimeError(f"{endpoint.engine_id}: the index missed an event")

    def _connect(self, endpoint: Endpoint, ledger: EngineLedger, on_change: Callable[[], None]) -> Connection:
        self.ledgers.append((ledger, endpoint))
        return HeardFrom()  # type: ignore[return-value]  # nothing is submitted


def _endpoint(number: int, engines: int) -> Endpoint:
    role = Role.PREFILL if number < engines // 2 else Role.DECODE
    return Endpoint(
        engine_id=f"{role.value}-{number:04}", role=role, epoch=number + 1, address="", pid=1, state=EngineState.READY
    )


def _prompt(rng: Random, number: int) -> Request:
    system = tuple(range(SYSTEM_TOKENS))
    rest = tuple(rng.randrange(100_000) for _ in range(PROMPT_TOKENS - SYSTEM_TOKENS))
    return Request(id=f"p{number}", prompt_token_ids=system + rest, sampling=SamplingParams(max_tokens=256))


def _chain(request: Request) -> tuple[BlockHash, ...]:
    namespace = hash_namespace(request.salt, CAPACITY.model_revision)
    return tuple(block_hashes(request.prompt_token_ids, BLOCK_SIZE, namespace))


def decisions(engines: int, count: int, policy: str, seed: int) -> dict[str, float]:
    """Milliseconds."""
    deployment = Deployment(engines, policy, seed)
    for number in range(count // 4):
        deployment.decide(-number)
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY)
    taken = [deployment.decide(number) for number in range(count)]
    gc.unfreeze()
    hashing, deciding, busy = ([1e3 * seconds for seconds in each] for each in zip(*taken, strict=True))
    return {
        "decision_p50": statistics.median(deciding),
        "decision_p99": statistics.quantiles(deciding, n=100)[98],
        "decision_max": max(deciding),
        "processor_p50": statistics.median(busy),
        "processor_p99": statistics.quantiles(busy, n=100)[98],
        "hashing_p50": statistics.median(hashing),
    }


def memory(blocks: int, engines: int, seed: int) -> dict[str, float]:
    """Bytes the index takes for so many blocks, each on one engine but for a tenth that a second one holds; and events
    per second it takes in meanwhile, each of one block, and blocks per second in events of 64."""
    rng = Random(seed)
    index = KVIndex(max_blocks=2 * blocks)
    keys = [(f"engine-{number:04}", number + 1) for number in range(engines)]
    for key in keys:
        index.restore(key, KVSnapshot(number=0, hashes=(), first=True, last=True))
    numbers = dict.fromkeys(keys, 0)

    def take(each: int, total: int) -> float:
        """Blocks per second in events of `each`."""
        spent, made = 0.0, 0
        while made < total:
            batch = []
            for hashes in _made(rng, each, min(total - made, 65_536)):
                for key in (rng.choice(keys), rng.choice(keys))[: 2 if rng.random() < 0.1 else 1]:
                    numbers[key] += 1
                    batch.append((key, [KVEvent(number=numbers[key], kind=KVEventKind.STORED, hashes=hashes)]))
                made += len(hashes)
            begun = time.perf_counter()
            for key, events in batch:
                index.apply(key, events)
            spent += time.perf_counter() - begun
        return total / spent

    before = _resident()
    many = take(64, blocks - blocks // 10)
    single = take(1, blocks // 10)
    gc.collect()
    taken = _resident() - before
    return {"bytes": taken, "bytes_per_block": taken / blocks, "events_per_second": single, "blocks_per_second": many}


def _made(rng: Random, each: int, total: int) -> Iterator[tuple[BlockHash, ...]]:
    for _ in range(-(-total // each)):
        random = rng.randbytes(16 * each)
        yield tuple(random[at : at + 16] for at in range(0, 16 * each, 16))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, nargs="*", default=[64, 1000])
    parser.add_argument("--decisions", type=int, default=2000)
    parser.add_argument(
        "--blocks", type=int, default=10_000_000, help="In the index whose memory is measured; 0: none."
    )
    parser.add_argument("--policy", default="kv_aware")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "routing_decision.json")
    args = parser.parse_args()
    result: dict[str, object] = {
        "benchmark": "routing_decision",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "policy": args.policy,
        "prompt_tokens": PROMPT_TOKENS,
        "decisions": args.decisions,
        "milliseconds": {n: decisions(n, args.decisions, args.policy, args.seed) for n in args.engines},
    }
    if args.blocks:
        result["index"] = {"blocks": args.blocks, **memory(args.blocks, 64, args.seed)}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
