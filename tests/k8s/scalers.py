"""`pdserve scale` as processes of this machine, and what a gateway would tell them."""

import asyncio
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from pdserve.cluster.k8s.rights import SCALER_RIGHTS, Right
from pdserve.cluster.scaling import explain_scaling, report_demand
from pdserve.core.errors import PdserveError
from tests.deployment import SERVE
from tests.unit.scaler.policies import demand
from tests.waiting import eventually

LEASE = 6.0
SCALE = [*SERVE[: SERVE.index("serve")], "scale"]
FIXED: dict[str, Any] = {
    "forecast": {"kind": "none"},
    "down": {"cooldown": 0, "window": 0},
    "targets": {"slo": None, "backlog_seconds": None, "kv_occupancy": None, "queue": None},
}
"""A pool without signals, so that bounds alone decide."""


class Scaler:
    """One `pdserve scale`."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any], kubeconfig: Path) -> None:
        self.name = name
        self.address = f"127.0.0.1:{free_port()}"
        self.probes = f"127.0.0.1:{free_port()}"
        self._log = folder / f"{name}.log"
        settings = {**settings, "scaler": {**settings["scaler"], "port": int(self.address.rpartition(":")[2])}}
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")
        where = ["--host", "127.0.0.1", "--probe-port", self.probes.rpartition(":")[2]]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*SCALE, "--config", str(file), *where],
                env={**os.environ, "KUBECONFIG": str(kubeconfig), "POD_NAME": name},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def leads(self) -> bool:
        return self._probe("/ready")

    def lives(self) -> bool:
        return self._probe("/live")

    def _probe(self, path: str) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://{self.probes}{path}", timeout=5).status_code == 200
        return False

    def metrics(self) -> str:
        return httpx.get(f"http://{self.probes}/metrics", timeout=5).text

    def explanation(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(asyncio.run(explain_scaling(self.address)))
        return answer

    def pool(self, role: str) -> tuple[int, int, int]:
        """(wanted, ready, warming) at the last decision."""
        pools = {pool["role"]: pool for pool in self.explanation()["pools"]}
        return (pools[role]["wanted"], pools[role]["ready"], pools[role]["warming"]) if role in pools else (0, 0, 0)

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Scalers:
    """Of one deployment, whose policy may be changed."""

    def __init__(self, folder: Path, namespace: str, kubeconfig: Path, **targets: str) -> None:
        self.all: list[Scaler] = []
        self._folder = folder
        self._kubeconfig = kubeconfig
        self._settings = {
            "policies": str(folder / "policies.yaml"),
            "scaler": {"kubernetes": {"namespace": namespace, **targets}},
            "times": {"scaler_lease": LEASE, "kubernetes_answer": LEASE / 3},
        }
        self.decide()

    def decide(self, prefill: int = 1, decode: int = 1) -> None:
        """Change the policy so that so many engines are right."""
        numbers = {"prefill": prefill, "decode": decode}
        wanted = {role: {**FIXED, "min": number, "max": number} for role, number in numbers.items()}
        policy = {"interval": 0.5, "window": 5, "bypass": {"enabled": False}, "pools": wanted}
        replacement = self._folder / "policies.new"
        replacement.write_text(json.dumps(policy), encoding="utf-8")  # JSON is YAML
        replacement.replace(self._folder / "policies.yaml")

    def start(self, name: str = "scaler-0") -> Scaler:
        scaler = Scaler(name, self._folder, self._settings, self._kubeconfig)
        self.all.append(scaler)
        return scaler

    def eventually(self, holds: Callable[[], bool], within: float = 60.0) -> None:
        eventually(holds, within, lambda: "\n".join(scaler.said() for scaler in self.all), (PdserveError,))


@contextmanager
def scaling(folder: Path, namespace: str, kubeconfig: Path, **targets: str) -> Iterator[Scalers]:
    """Without a scaler yet. A gateway's reports go to whichever of them hears them."""
    scalers = Scalers(folder, namespace, kubeconfig, **targets)
    over = threading.Event()
    gateway = threading.Thread(target=_report, args=(scalers.all, over))
    gateway.start()
    try:
        yield scalers
    finally:
        over.set()
        gateway.join()
        for scaler in scalers.all:
            scaler.close()


def _report(scalers: Sequence[Scaler], over: threading.Event) -> None:
    while not over.wait(0.3):
        for scaler in tuple(scalers):
            with suppress(PdserveError):
                asyncio.run(report_demand(scaler.address, "gateway", demand(seconds=0.3)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def rules(*without: str) -> list[dict[str, list[str]]]:
    """Of a Role with the scaler's rights, without some verbs on what is scaled."""
    return [_rule(right) for right in SCALER_RIGHTS if not (right.verb in without and right.group)]


def _rule(right: Right) -> dict[str, list[str]]:
    return {"apiGroups": [right.group], "resources": [right.resource], "verbs": [right.verb]}
