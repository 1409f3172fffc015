"""A Kubernetes control plane on loopback: etcd, API server, controller manager and scheduler, without nodes.

Everything they write lies in one folder. Clients verify the API server's certificate, which it makes itself; its
key signs the tokens of service accounts too.
"""

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.k8s.binaries import folder as binaries

START_TIMEOUT = 90.0
_TOKEN = "administrator-of-a-test"


class ControlPlane:
    """Start with `running`. `kubeconfig` is an administrator's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._certificates = folder / "certificates"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd = f"http://127.0.0.1:{_free_port()}"
        self._port = _free_port()
        self.server = f"https://127.0.0.1:{self._port}"
        self.authority = self._certificates / "apiserver.crt"
        self.kubeconfig = folder / "kubeconfig"

    def start(self) -> None:
        peers = f"http://127.0.0.1:{_free_port()}"
        self._run(
            "etcd",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={peers}",
        )
        (self._folder / "tokens.csv").write_text(f"{_TOKEN},admin,admin,system:masters\n", encoding="ascii")
        write_kubeconfig(self.kubeconfig, self.server, self.authority, _TOKEN)
        self.start_api()
        for program in ("kube-controller-manager", "kube-scheduler"):
            signing = [f"--service-account-private-key-file={self._certificates / 'apiserver.key'}"]
            signing += [f"--root-ca-file={self.authority}"]
            self._run(
                program,
                f"--kubeconfig={self.kubeconfig}",
                f"--cert-dir={self._folder / program}",
                f"--secure-port={_free_port()}",
                "--bind-address=127.0.0.1",
                "--port=0",  # no insecure one
                "--leader-elect=false",
                *(signing if program == "kube-controller-manager" else []),
            )

    def start_api(self) -> None:
        """Return once the API server is ready; it remembers what etcd does."""
        key = self._certificates / "apiserver.key"
        self._run(
            "kube-apiserver",
            f"--etcd-servers={self._etcd}",
            f"--cert-dir={self._certificates}",
            f"--token-auth-file={self._folder / 'tokens.csv'}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--endpoint-reconciler-type=none",  # its own address is a loopback one, which Endpoints may not have
        )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            assert self._processes["kube-apiserver"].poll() is None, self._said("kube-apiserver")
            assert time.monotonic() < deadline, self._said("kube-apiserver")
            time.sleep(0.1)

    def stop_api(self) -> None:
        """Nobody answers at the API server's address until `start_api`. Killed: asked to end, it would wait a minute
        for those who watch; etcd has what it was told."""
        self._processes["kube-apiserver"].kill()
        self._processes.pop("kube-apiserver").wait()

    def restart_api(self) -> None:
        """Every watch breaks; return once the API server is ready again."""
        self.stop_api()
        self.start_api()

    def close(self) -> None:
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        self._processes.clear()

    def _run(self, program: str, *arguments: str) -> None:
        with (self._folder / f"{program}.log").open("ab") as log:
            self._processes[program] = subprocess.Popen(
                [binaries() / program, *arguments], cwd=self._folder, stdout=log, stderr=subprocess.STDOUT
            )

    def _is_ready(self) -> bool:
        with suppress(httpx.HTTPError, OSError):  # OSError: it has not written its certificate
            trust = ssl.create_default_context(cafile=self.authority)
            headers = {"Authorization": f"Bearer {_TOKEN}"}
            return httpx.get(f"{self.server}/readyz", verify=trust, headers=headers, timeout=5).status_code == 200
        return False

    def _said(self, program: str) -> str:
        return (self._folder / f"{program}.log").read_text(encoding="utf-8", errors="replace")[-4000:]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def write_kubeconfig(path: Path, server: str, authority: Path, token: str) -> None:
    """For whoever has the token; JSON is YAML."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": str(authority)}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def running(folder: Path) -> Iterator[ControlPlane]:
    """A control plane that is ready."""
    plane = ControlPlane(folder)
    try:
        plane.start()
        yield plane
    finally:
        plane.close()
