"""Pods of the Helm chart as processes of this machine: the same commands, probes, files and signals, without a cluster.

Each pod has a loopback address of its own. What a cluster would do is done by replacing: a name's addresses are
written out, and /etc/pdserve lies in a folder.
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
from pathlib import Path
from typing import Any

import httpx

from deploy.chart import Manifest, render
from tests.chart.manifests import named, of_kind
from tests.contract.processes import descendants, is_gone
from tests.deployment import START_TIMEOUT

PDSERVE = (sys.executable, "-c", "from pdserve.cli import main; main()")
_MOUNTED = "/etc/pdserve"
_CONFIG = f"{_MOUNTED}/config"
_CACHES = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
"""This machine's own have what a new pod would first compile."""


class Pod:
    """One container's process."""

    def __init__(self, name: str, ip: str, spec: dict[str, Any], folder: Path, names: dict[str, str]) -> None:
        """names are those of the cluster, with what stands for them here."""
        self.name = name
        self._names = names
        self.ip = ip
        (self._container,) = spec["containers"]
        self.grace = spec.get("terminationGracePeriodSeconds", 30)
        self.log = folder / f"{name}.log"
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.deleted = False

    def start(self, **environment: str) -> None:
        """Run the container's command."""
        own = {"POD_NAME": self.name, "POD_IP": self.ip}
        fixed = {entry["name"]: entry["value"] for entry in self._container["env"] if "value" in entry}
        fixed = {
            name: value.replace(_MOUNTED, str(self._folder)) for name, value in fixed.items() if name not in _CACHES
        }
        words = [*self._container.get("command", PDSERVE), *self._container.get("args", [])]
        if words[:2] == ["tini", "--"]:
            words = words[2:]
        for name, value in [*((f"$({name})", value) for name, value in own.items()), *self._names.items()]:
            words = [word.replace(name, value) for word in words]
        words = [word.replace(_CONFIG, str(self._folder / f"config-{self.name}")) for word in words]
        words = [word.replace(_MOUNTED, str(self._folder)) for word in words]
        self.deleted = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._apart(), *words] if any("ray start" in word for word in words) else words,
                env={**os.environ, **fixed, **own, **environment, "PATH": _path()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _apart(self) -> tuple[str, ...]:
        """What gives a Ray node its own processes, which end with the first of them, and its own session folder."""
        session = self._folder / f"{self.name}-ray"
        session.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        return (*unshare, "sh", "-c", 'mount --bind "$0" /tmp/ray && exec "$@"', str(session))

    def probe(self, which: str) -> int | None:
        """Status of an HTTP probe; None when nothing answers."""
        if "exec" in self._container[which]:
            return 200  # looks into a folder that each pod has to itself
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


class Pods:
    """The pods of a release of the chart, by name. `router` is the first of the routers."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        self._manifests = render(values)
        self._folder = folder
        self._network = f"127.{random.randint(16, 250)}.{random.randint(1, 250)}"
        self._names: dict[str, str] = {}
        self.pods: dict[str, Pod] = {}
        for workload in of_kind(self._manifests, "StatefulSet", "Deployment"):
            for number in range(workload["spec"]["replicas"]):
                self._add(f"{workload['metadata']['name']}-{number}", workload["spec"]["template"]["spec"])
        self.router = self.pods["pdserve-router-0"]
        self._write_secrets()
        for pod in self.pods.values():
            self._write_config(pod)

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
        self._write_config(pod)
        return pod

    def free_address(self, port: int) -> str:
        """host:port beside the pods."""
        return f"{self._network}.254:{port}"

    def helm_test(self) -> Pod:
        """The pod of `helm test`, started."""
        pod = self._add("pdserve-test", named(self._manifests, "Pod", "pdserve-test")["spec"])
        pod.start(PDSERVE_URL=self.url)
        return pod

    def close(self) -> None:
        for pod in self.pods.values():
            pod.close()

    def _add(self, name: str, spec: dict[str, Any]) -> Pod:
        ip = f"{self._network}.{len(self.pods) + 2}"
        self.pods[name] = Pod(name, ip, spec, self._folder, self._names)
        if name == "pdserve-ray-head-0":
            self._names["pdserve-ray-head.pdserve.svc"] = ip
        return self.pods[name]

    def _write_secrets(self) -> None:
        secret = named(self._manifests, "Secret", "pdserve-api-keys")
        keys = self._folder / "keys" / "api-keys"
        keys.parent.mkdir()
        keys.write_bytes(base64.b64decode(secret["data"]["api-keys"]))
        self.key = keys.read_text(encoding="ascii").strip()
        for secret in of_kind(self._manifests, "Secret"):
            if "token" in secret["data"]:
                token = self._folder / "ray" / "token"
                token.parent.mkdir()
                token.touch(mode=0o600)
                token.write_bytes(base64.b64decode(secret["data"]["token"]))

    def _write_config(self, pod: Pod) -> None:
        """The ConfigMap as that pod sees it, which listens at its own address only."""
        config = self._folder / f"config-{pod.name}"
        config.mkdir()
        for name, text in named(self._manifests, "ConfigMap", "pdserve-config")["data"].items():
            text = text.replace(_CONFIG, str(config)).replace(_MOUNTED, str(self._folder)).replace("0.0.0.0", pod.ip)
            for service in of_kind(self._manifests, "Service"):
                text = text.replace(*self._resolved(service))
            for full, ip in self._names.items():
                text = text.replace(full, ip)
            (config / name).write_text(text, encoding="utf-8")

    def _resolved(self, service: Manifest) -> tuple[str, str]:
        """The line of a headless Service's name, and those of its pods' addresses."""
        name = service["metadata"]["name"]
        ips = [pod.ip for pod in self.pods.values() if pod.name.rpartition("-")[0] == name]
        return f"- {name}.pdserve.svc:8100", "\n  ".join(f"- {ip}:8100" for ip in ips)


def _path() -> str:
    """With this interpreter as `python`, as in the image."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


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
