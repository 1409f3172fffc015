"""What the front costs: CPU time of a gateway per request and per token, whatever engines do behind it.

A real gateway (HTTP, templates, tokenizer, router, dispatch, detokenizer) before scripted prefill and decode engines
(front_engine) that answer as fast as they are read, or at a pace. Clients are raw sockets, which keeps the machine for
the gateway. `--workers 1 2` has one gateway of each number of workers, under load in turns. `--hold` only starts it all
and prints where, for a load generator of one's own.
"""

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.other_load import Moment, others_cores
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.registry import Registry
from pdserve.config.schema import DEMO_MODEL, Config
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.launch.deployment import desired_gateway
from pdserve.launch.fronts import front_socket
from pdserve.model.config import load_config

WORDS = ("the", "nation", "other", "road", "here", "there", "ruin", "file", "line", "word", "python", "count", "open")


@dataclass(frozen=True)
class Front:
    """pid: of the process that decides; fronts: of those before it, with several workers."""

    port: int
    admin_port: int
    pid: int
    fronts: tuple[int, ...] = ()

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.pid, *self.fronts)


@dataclass
class Tally:
    """Of one window: requests ended, data events and bytes read, seconds to each first event."""

    requests: int = 0
    events: int = 0
    num_bytes: int = 0
    first: list[float] | None = None


@asynccontextmanager
async def front(
    pace: float, model: str = DEMO_MODEL, workers: int = 1, *, stores: bool = False
) -> AsyncIterator[Front]:
    """A gateway before one prefill and one decode engine. model: whose tokenizer, template and sizes to take. stores:
    whether engines tell of cached blocks."""
    ports = {name: _free_port() for name in ("port", "grpc_port", "admin_port")}
    config = Config.model_validate({"model": model, "workers": workers, "log": {"level": "warning"}, **ports})
    vocab_size = load_config(config.model_path).vocab_size
    async with AsyncExitStack() as stack:
        registry = Registry()
        await registry.start()
        stack.push_async_callback(registry.stop)
        endpoints = []
        for role in (Role.PREFILL, Role.DECODE):
            told = {
                "engine_id": f"{role}-0",
                "role": role.value,
                "pace": pace,
                "vocab_size": vocab_size,
                "stores": stores,
            }
            endpoints.append(await stack.enter_async_context(_engine(told)))
        registry.publish(tuple(endpoints))
        socket = stack.enter_context(front_socket(config))
        processes = []
        for desired in desired_gateway(config, registry.address, socket=socket):
            processes.append(await ProcessLauncher().launch(desired.launch(0)))
            stack.callback(processes[-1].kill)
        for process in processes:
            await process.ready()
        await _until_answering(config.port)
        gateway, *fronts = (process.pid for process in processes)
        yield Front(config.port, ports["admin_port"], gateway, tuple(fronts))


@asynccontextmanager
async def _engine(told: dict[str, Any]) -> AsyncIterator[Endpoint]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.front_engine", stdin=pipe, stdout=pipe
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(told).encode() + b"\n")
        facts = json.loads(await process.stdout.readline())
        yield Endpoint(
            engine_id=told["engine_id"],
            role=Role(told["role"]),
            epoch=facts["epoch"],
            address=facts["address"],
            pid=facts["pid"],
            state=EngineState.READY,
        )
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 10)


def request_bytes(seed: int, output_tokens: int, stream: bool) -> bytes:
    words = " ".join(WORDS[(seed * 7 + index * index) % len(WORDS)] for index in range(40))
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": f"{seed} {words}"}],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": stream,
        }
    )
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: front\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


async def client(port: int, seeds: "asyncio.Queue[int]", tally: Tally, output_tokens: int, stream: bool) -> None:
    """Requests one after the other over one connection, for as long as it is left to run."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        while True:
            seed = seeds.get_nowait()
            seeds.put_nowait(seed + 1)
            sent = time.perf_counter()
            writer.write(request_bytes(seed, output_tokens, stream))
            status = await reader.readline()
            assert b" 200 " in status, status
            headers = await reader.readuntil(b"\r\n\r\n")
            if stream:
                await _read_events(reader, tally, sent)
            else:
                length = int(headers.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
                tally.num_bytes += len(await reader.readexactly(length))
            tally.requests += 1
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, tally: Tally, sent: float) -> None:
    first = True
    tail = b""
    while not tail.endswith(b"0\r\n\r\n"):
        chunk = await reader.read(1 << 18)
        assert chunk, "the gateway hung up"
        if first and tally.first is not None:
            tally.first.append(time.perf_counter() - sent)
        first = False
        tally.events += chunk.count(b"data: ")
        tally.num_bytes += len(chunk)
        tail = (tail + chunk)[-16:]


async def window(front: Front, *, concurrency: int, output_tokens: int, stream: bool, seconds: float) -> dict[str, Any]:
    """One closed-loop run against the front, its first fifth not counted."""
    seeds: asyncio.Queue[int] = asyncio.Queue()
    seeds.put_nowait(0)
    tally = Tally(first=[])
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(client(front.port, seeds, tally, output_tokens, stream)) for _ in range(concurrency)
        ]
        await asyncio.sleep(seconds / 5)
        begun, before = Tally(tally.requests, tally.events, tally.num_bytes), Moment.now(front.pids)
        decided = Moment.now([front.pid]).ours
        tally.first = []
        await asyncio.sleep(seconds)
        after = Moment.now(front.pids)
        decided = Moment.now([front.pid]).ours - decided
        for task in running:
            task.cancel()
    requests, cpu = tally.requests - begun.requests, after.ours - before.ours
    tokens = requests * output_tokens
    first = sorted(tally.first)
    return {
        "requests_per_second": requests / seconds,
        "tokens_per_second": tokens / seconds,
        "events_per_token": (tally.events - begun.events) / max(1, tokens),
        "cpu_seconds_per_thousand_requests": cpu / max(1, requests) * 1e3,
        "cpu_seconds_per_million_tokens": cpu / max(1, tokens) * 1e6,
        "of_it_by_the_process_that_decides": decided / max(1e-9, cpu),
        "ttft_p50_ms": 1e3 * statistics.median(first) if first else None,
        "ttft_p99_ms": 1e3 * first[int(0.99 * len(first))] if first else None,
        "rss_mb": sum(map(rss_mb, front.pids)),
        "other_cores": others_cores(before, after),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rss_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def _until_answering(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /ready HTTP/1.0\r\n\r\n")
                answered = b" 200 " in await reader.readline()
                writer.close()
                if answered:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.1)


CASES: dict[str, dict[str, Any]] = {
    "8 tokens, whole, 64 clients": {"concurrency": 64, "output_tokens": 8, "stream": False},
    "128 tokens, streamed, 64 clients": {"concurrency": 64, "output_tokens": 128, "stream": True},
    "128 tokens, streamed, 256 clients": {"concurrency": 256, "output_tokens": 128, "stream": True},
    "2 tokens, streamed, 1 client": {"concurrency": 1, "output_tokens": 2, "stream": True},
}


async def measure(pace: float, seconds: float, rounds: int, only: str, workers: list[int]) -> dict[str, Any]:
    """Windows by number of workers and case."""
    results: dict[str, Any] = {str(number): {} for number in workers}
    async with AsyncExitStack() as stack:
        up = {number: await stack.enter_async_context(front(pace, workers=number)) for number in workers}
        for turn in range(rounds):
            for name, case in CASES.items():
                if only not in name:
                    continue
                for number in workers if turn % 2 == 0 else workers[::-1]:
                    result = await window(up[number], seconds=seconds, **case)
                    results[str(number)].setdefault(name, []).append(result)
                    shown = {key: round(value, 3) for key, value in result.items() if value}
                    print(f"{number} workers, {name}", json.dumps(shown), flush=True)
    return results


async def hold(pace: float, workers: int) -> None:
    async with front(pace, workers=workers) as running:
        print(json.dumps({"port": running.port, "pids": running.pids}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two tokens of a stream")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="processes that speak with clients")
    parser.add_argument("--hold", action="store_true", help="with the first number of workers")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.hold:
        asyncio.run(hold(arguments.pace, arguments.workers[0]))
    else:
        a = arguments
        measured = asyncio.run(measure(a.pace, a.seconds, a.rounds, a.only, a.workers))
        if arguments.out:
            arguments.out.write_text(json.dumps(measured, indent=1) + "\n")
