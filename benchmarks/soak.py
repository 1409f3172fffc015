"""Twenty minutes of mixed load: does any process grow?

Four clients at a time ask 2 prefill and 2 decode engines of the demo model: short and long prompts, shared prefixes,
streams and whole answers, text and chat, and a sixth of them hang up. Meanwhile the memory that is each process's own
(private pages: RSS counts shared KV twice), its threads and its files are noted. The verdict looks at the second half
only: caches, pools and allocators fill up in the first.
"""

import argparse
import json
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from tests.deployment import Deployment, deployed, write_config

CLIENTS = 4
SAMPLE_EVERY = 10.0
"""Seconds between two looks at the processes."""
FLAT = 0.03
"""Share by which the median of the last quarter may exceed that of the third."""
SPARE = 4
"""Threads or files a process may hold more at the end than half-way."""
POOLS = {"prefill": {"engines": 2}, "decode": {"engines": 2}}
WORDS = ("the", "nation", "other", "road", "here", "there", "ruin", "file", "line", "word", "python", "count", "open")


@dataclass(frozen=True)
class Holdings:
    """What one process holds. mebibytes are private."""

    mebibytes: float
    threads: int
    files: int


def holdings(pid: int) -> Holdings:
    process = Path(f"/proc/{pid}")
    private = 0
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Private_"):
            private += int(line.split()[1])
    return Holdings(private / 1024, len(list((process / "task").iterdir())), len(list((process / "fd").iterdir())))


def processes(deployment: Deployment) -> dict[str, int]:
    """Process ids by role: the engines as they name themselves, the gateway, the supervisor."""
    engines = {id: engine["pid"] for id, engine in deployment.engines().items()}
    others = set(deployment.children()) - set(engines.values())
    [gateway] = [pid for pid in others if b"pdserve.launch.gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return {"supervisor": deployment.process.pid, "gateway": gateway, **engines}


def send(deployment: Deployment, client: httpx.Client, rng: random.Random, documents: list[str]) -> str:
    """One request of a random kind; returns how it ended."""
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.choice((5, 20, 60, 200))))
    if rng.random() < 0.5:
        prompt = rng.choice(documents) + prompt
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 4, 16, 48)), "temperature": rng.choice((0, 0.8))}
    chat = rng.random() < 0.3
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    url = f"{deployment.url}/v1/{'chat/' if chat else ''}completions"
    if rng.random() < 0.4:
        return str(client.post(url, json=body).status_code)
    leave_after = rng.randrange(1, 6) if rng.random() < 0.28 else None
    with client.stream("POST", url, json={**body, "stream": True}) as response:
        for number, _ in enumerate(response.iter_lines()):
            if leave_after == number:
                return "left"
        return str(response.status_code)


def load(deployment: Deployment, seed: int, over: threading.Event) -> dict[str, int]:
    """Ask, one request after another, until it is over. Returns how requests ended."""
    rng, ends = random.Random(seed), dict[str, int]()
    documents = [" ".join(rng.choice(WORDS) for _ in range(150)) for _ in range(20)]
    with httpx.Client(timeout=60) as client:
        while not over.is_set():
            end = send(deployment, client, rng, documents)
            ends[end] = ends.get(end, 0) + 1
    return ends


def run(seconds: float, seed: int) -> tuple[dict[str, int], dict[str, list[Holdings]]]:
    """Returns how the requests ended, and what each process held at each look."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder / "cluster.yaml", {"device": "cpu", "pools": POOLS})
        with deployed(folder / "log", str(config)) as deployment, ThreadPoolExecutor(CLIENTS) as clients:
            roles = processes(deployment)
            seen: dict[str, list[Holdings]] = {role: [] for role in roles}
            over = threading.Event()
            running = [clients.submit(load, deployment, seed + n, over) for n in range(CLIENTS)]
            until = time.monotonic() + seconds
            try:
                while time.monotonic() < until and not any(client.done() for client in running):
                    time.sleep(SAMPLE_EVERY)
                    for role, pid in roles.items():
                        seen[role].append(holdings(pid))
                    print({role: round(held[-1].mebibytes) for role, held in seen.items()}, flush=True)
            finally:
                over.set()
            ends: dict[str, int] = {}
            for client in running:
                for end, count in client.result().items():
                    ends[end] = ends.get(end, 0) + count
    return ends, seen


def judged(held: list[Holdings]) -> dict[str, Any]:
    """One process's growth over the second half of the run."""
    half, quarter = len(held) // 2, len(held) // 4
    third, last = held[half:-quarter], held[-quarter:]
    before, after = (statistics.median(h.mebibytes for h in part) for part in (third, last))
    return {
        "mebibytes": {"start": round(held[0].mebibytes, 1), "third_quarter": round(before, 1), "end": round(after, 1)},
        "threads": [held[0].threads, held[half].threads, held[-1].threads],
        "files": [held[0].files, held[half].files, held[-1].files],
        "flat": after <= before * (1 + FLAT)
        and held[-1].threads <= held[half].threads + SPARE
        and held[-1].files <= held[half].files + SPARE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    args = parser.parse_args()
    ends, seen = run(args.minutes * 60, args.seed)
    verdicts = {role: judged(held) for role, held in seen.items()}
    report = {
        "benchmark": "soak",
        "model": "demo",
        "minutes": args.minutes,
        "seed": args.seed,
        "ends": ends,
        "processes": verdicts,
        "mebibytes": {role: [round(h.mebibytes, 1) for h in held] for role, held in seen.items()},
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"ends": ends, "processes": verdicts}, indent=1))
    raise SystemExit(0 if all(v["flat"] for v in verdicts.values()) and ends.keys() <= {"200", "left"} else 1)


if __name__ == "__main__":
    main()
