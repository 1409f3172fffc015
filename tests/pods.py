"""Pods of the Helm chart as processes of this machine: the same commands, probes, files and signals, without a cluster.

Each pod has a loopback address and a folder of its own. What a cluster would do is done by replacing: a name's
addresses are written out, 0.0.0.0 is the pod's own, and /etc/pdserve lies in its folder.
"""

import base64
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy.chart import Manifest, render
from tests.chart.manifests import named, of_kind
from tests.contract.processes import descendants, is_gone
from tests.deployment import START_TIMEOUT
from tests.redis_server import programs

PDSERVE = (sys.executable, "-c", "from pdserve.cli import main; main()")
_MOUNTED = "/etc/pdserve"
_CACHES = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
"""This machine's own have what a new pod would first compile."""


class Pod:
    """One container's process."""

    def __init__(
        self, name: str, ip: str, spec: dict[str, Any], folder: Path, cluster: "Cluster", injected: dict[str, str]
    ) -> None:
        """injected: variables that an operator puts before the container's own."""
        self.name = name
        self._cluster = cluster
        self._injected = injected
        self.ip = ip
        (self._container,) = spec["containers"]
        self.grace = spec.get("terminationGracePeriodSeconds", 30)
        self.log = folder / "log"
        self._folder = folder
        folder.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.deleted = False

    def start(self, **environment: str) -> None:
        """Run the container's command."""
        own = dict(self._injected)
        for entry in self._container["env"]:
            if entry["name"] not in _CACHES:
                own[entry["name"]] = self._here(self._value(entry), own)
        words = [*self._container.get("command", PDSERVE), *self._container.get("args", [])]
        if words[:2] == ["tini", "--"]:
            words = words[2:]
        words = [self._here(word, own) for word in words]
        self.deleted = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._apart(), *words] if any("ray start" in word for word in words) else words,
                env={**os.environ, **own, **environment, "PATH": _path()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def write(self, name: str, text: str) -> None:
        """A file below /etc/pdserve, which only this user may read."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(self._here(text, {}), encoding="utf-8")

    def _here(self, text: str, variables: dict[str, str]) -> str:
        """What a cluster would make of a text."""
        given = {f"$({name})": value for name, value in variables.items()}
        own = {_MOUNTED: str(self._folder), "0.0.0.0": self.ip}
        for name, value in (given | self._cluster.names | own).items():
            text = text.replace(name, value)
        return text

    def _value(self, entry: dict[str, Any]) -> str:
        """Of a variable."""
        match entry:
            case {"valueFrom": {"fieldRef": {"fieldPath": field}}}:
                return {"metadata.name": self.name, "status.podIP": self.ip}[field]
            case {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}:
                return self._cluster.secrets[name][key]
        return str(entry["value"])

    def _apart(self) -> tuple[str, ...]:
        """What gives a Ray node its own processes, which end with the first of them, and its own session folder."""
        session = self._folder / "session"
        session.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        return (*unshare, "sh", "-c", 'mount --bind "$0" /tmp/ray && exec "$@"', str(session))

    def probe(self, which: str) -> int | None:
        """Status of an HTTP probe; None when nothing answers."""
        if "exec" in self._container.get(which, {"exec": None}):
            return 200  # looks where the pods of a machine are not apart, or is not there
        get = self._container[which]["httpGet"]
        (port,) = [port["containerPort"] for port in self._container["ports"] if port["name"] == get["port"]]
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://{self.ip}:{port}{get['path']}", timeout=5).status_code
        return None

    def until(self, which: str, status: int | None, within: float = 60.0) -> None:
        """Return once a probe answers so."""
        deadline = time.monotonic() + within
        while self.probe(which) != status:
            assert time.monotonic() < deadline, f"{self.name}: {which} is not {status}\n{self.said()}"
            time.sleep(0.05)

    def delete(self) -> None:
        """What a kubelet does first."""
        assert self.process
        self.deleted = True
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """The exit code; it must come within the grace period."""
        assert self.process
        return self.process.wait(self.grace)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        if self.process is None:
            return
        children = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert all(is_gone(pid, within=5) for pid in children)


@dataclass(frozen=True)
class Cluster:
    """names: those of the cluster, with what stands for them here. secrets: by name and key."""

    names: dict[str, str]
    secrets: dict[str, dict[str, str]]


class Pods:
    """The pods of a release of the chart, by name. `router` is the first of the routers."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        self._manifests = render(values)
        self._folder = folder
        self._network = f"127.{random.randint(16, 250)}.{random.randint(1, 250)}"
        self._cluster = Cluster(
            {}, {secret["metadata"]["name"]: _opened(secret) for secret in of_kind(self._manifests, "Secret")}
        )
        self.key = self._cluster.secrets["pdserve-api-keys"]["api-keys"].strip()
        self.pods: dict[str, Pod] = {}
        for workload in of_kind(self._manifests, "StatefulSet", "Deployment"):
            for number in range(workload["spec"]["replicas"]):
                self._add(f"{workload['metadata']['name']}-{number}", workload["spec"]["template"]["spec"])
        for groups in of_kind(self._manifests, "LeaderWorkerSet"):
            for number in range(groups["spec"]["replicas"]):
                self._add_group(f"{groups['metadata']['name']}-{number}", groups["spec"]["leaderWorkerTemplate"])
        for service in of_kind(self._manifests, "Service"):
            self._cluster.names.update(self._resolved(service))
        for pod in self.pods.values():
            self._write_files(pod)
        self.router = self.pods["pdserve-router-0"]

    @property
    def url(self) -> str:
        return f"http://{self.router.ip}:8000"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def routers(self) -> list[Pod]:
        """Those that run and are not being deleted. Any thread may ask."""
        pods = list(self.pods.values())
        return [pod for pod in pods if "-router-" in pod.name and pod.process and not pod.deleted]

    def router_hosts(self) -> list[str]:
        return [pod.ip for pod in self.routers()]

    def add_router(self) -> Pod:
        """One more than there were, for a Deployment that replaces one; not started yet."""
        spec = named(self._manifests, "Deployment", "pdserve-router")["spec"]["template"]["spec"]
        number = sum("-router-" in name for name in self.pods)
        pod = self._add(f"pdserve-router-{number}", spec)
        self._write_files(pod)
        return pod

    def free_address(self, port: int) -> str:
        """host:port beside the pods."""
        return f"{self._network}.254:{port}"

    def helm_test(self) -> Pod:
        """The pod of `helm test`, started."""
        pod = self._add("pdserve-test", named(self._manifests, "Pod", "pdserve-test")["spec"])
        self._write_files(pod)
        pod.start(PDSERVE_URL=self.url)
        return pod

    def close(self) -> None:
        for pod in self.pods.values():
            pod.close()

    def _add(self, name: str, spec: dict[str, Any], **injected: str) -> Pod:
        ip = f"{self._network}.{len(self.pods) + 2}"
        self.pods[name] = Pod(name, ip, spec, self._folder / name, self._cluster, injected)
        return self.pods[name]

    def _add_group(self, name: str, template: dict[str, Any]) -> None:
        """As the operator of LeaderWorkerSets makes one."""
        leader = self._add(name, template["leaderTemplate"]["spec"])
        for index in range(1, template["size"]):
            own = {"LWS_LEADER_ADDRESS": leader.ip, "LWS_WORKER_INDEX": str(index)}
            self._add(f"{name}-{index}", template["workerTemplate"]["spec"], **own)

    def _write_files(self, pod: Pod) -> None:
        pod.write("keys/api-keys", self.key)
        for secret in self._cluster.secrets.values():
            if "token" in secret:
                pod.write("ray/token", secret["token"])
        for name, text in named(self._manifests, "ConfigMap", "pdserve-config")["data"].items():
            pod.write(f"config/{name}", text)

    def _resolved(self, service: Manifest) -> dict[str, str]:
        """What stands for a Service's name: its pod's address, or in a list those of all its pods."""
        name = service["metadata"]["name"]
        ips = [pod.ip for pod in self.pods.values() if pod.name.rpartition("-")[0] == name]
        if name in ("pdserve-prefill", "pdserve-decode"):
            return {f"- {name}.pdserve.svc:8100": "\n  ".join(f"- {ip}:8100" for ip in ips)}
        return {f"{name}.pdserve.svc": ips[0]} if ips else {}


def _opened(secret: Manifest) -> dict[str, str]:
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def _path() -> str:
    """With this interpreter as `python`, as in the image, and with Redis, as in its own."""
    return f"{Path(sys.executable).parent}:{programs()}:{os.environ['PATH']}"


@contextmanager
def running(values: dict[str, Any], folder: Path) -> Iterator[Pods]:
    """Pods that are ready."""
    release = Pods(values, folder)
    try:
        for pod in release.pods.values():
            pod.start()
        for pod in release.pods.values():
            pod.until("startupProbe", 200, START_TIMEOUT)
            pod.until("readinessProbe", 200)
        yield release
    finally:
        release.close()
