"""A Kubernetes node that runs containers, with its control plane and a name server, in a network namespace of its own.

As root, on a machine with containerd, runc, CNI plugins, iptables, conntrack, etcd and openssl, and BINARIES with
kube-apiserver, kube-controller-manager, kube-scheduler, kubelet and kube-proxy of Kubernetes 1.20:

    python -m tests.k8s.real_node start FOLDER BINARIES
    python -m tests.k8s.real_node import FOLDER IMAGE.tar
    python -m tests.k8s.real_node run FOLDER kubectl get pods -A
    python -m tests.k8s.real_node stop FOLDER

`run` gives a command the node's network and KUBECONFIG. Everything lies in FOLDER, images too, but for LEFT, which must
not be there before and is taken away by `stop`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.k8s.real_node_files import ADDRESS, API_SERVER, PAUSE, PAUSE_SOURCE, files

SPACE = "pdserve-node"
LEFT = tuple(map(Path, ("/var/lib/kubelet", "/var/log/pods", "/var/log/containers", "/var/lib/cni/results")))
SYSCTLS = ("vm.overcommit_memory", "kernel.panic", "kernel.panic_on_oops")
"""Kubelet changes them for the whole machine."""
CGROUPS = Path("/sys/fs/cgroup")
_PATIENCE = 120.0


def start(folder: Path, binaries: Path) -> None:
    """Return once the node takes pods."""
    if there := [path for path in (folder, *LEFT) if path.exists()]:
        raise SystemExit(f"{there[0]} exists: stop what it belongs to, or remove it")
    for name, text in files(folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "sysctls").write_text(_call("sysctl", *SYSCTLS), encoding="utf-8")
    _make_network()
    _start_containerd(folder)
    _start_control_plane(folder, binaries)
    kubectl = ("kubectl", f"--kubeconfig={folder / 'kubeconfig'}")
    _spawn(folder, "kubelet", binaries / "kubelet", f"--config={folder / 'kubelet.yaml'}", *_kubelet_flags(folder))
    _spawn(folder, "kube-proxy", binaries / "kube-proxy", f"--config={folder / 'proxy.yaml'}")
    _until(*kubectl, "wait", "--for=condition=Ready", "node/node-0", "--timeout=1s")
    _call(*_inside(), *kubectl, "apply", "-f", folder / "dns.yaml")
    server = (sys.executable, "-m", "tests.k8s.name_server")
    _spawn(folder, "name_server", *server, folder / "kubeconfig", ADDRESS)


def import_image(folder: Path, archive: Path) -> None:
    """Of `buildah push IMAGE docker-archive:archive:NAME` or `docker save`."""
    _call("ctr", f"--address={folder / 'containerd.sock'}", "--namespace=k8s.io", "images", "import", archive)


def run(folder: Path, *command: str) -> None:
    """Become that command."""
    os.environ["KUBECONFIG"] = str(folder / "kubeconfig")
    words = [*_inside(), *command]
    os.execvp(words[0], words)


def stop(folder: Path) -> None:
    """End everything, and leave the machine as it was."""
    if not (folder / "sysctls").exists():
        raise SystemExit(f"no node was started in {folder}")
    for daemon in ("kubelet", "kube-proxy", "name_server", "kube-scheduler", "kube-controller-manager"):
        with suppress(FileNotFoundError):
            _end([int((folder / f"{daemon}.pid").read_text(encoding="ascii"))])
    _end(_processes())
    for line in (folder / "sysctls").read_text(encoding="utf-8").splitlines():
        _call("sysctl", "--quiet", "--write", line.replace(" ", ""))
    for line in reversed(Path("/proc/mounts").read_text(encoding="utf-8").splitlines()):
        place = line.split()[1].encode().decode("unicode_escape")
        if place.startswith((f"{folder}/", "/run/netns/cni-", *(f"{left}/" for left in LEFT))):
            _call("umount", "--lazy", place)
    for space in (*Path("/run/netns").glob("cni-*"), Path("/run/netns") / SPACE):
        if space.exists():
            _call("ip", "netns", "del", space.name)
    for hierarchy in CGROUPS.glob("*/kubepods"):
        for group in sorted((path for path in (hierarchy, *hierarchy.rglob("*")) if path.is_dir()), reverse=True):
            group.rmdir()
    for left in (*LEFT, folder):
        shutil.rmtree(left, ignore_errors=left != folder)


def _make_network() -> None:
    """A bridge has the node's address: kernels need not have dummy devices."""
    _call("ip", "netns", "add", SPACE)
    for words in (
        "link set lo up",
        "link add node type bridge",
        f"addr add {ADDRESS}/24 dev node",
        "link set node up",
        "route add default dev node",
    ):
        _call(*_inside(), "ip", *words.split())
    for switch in ("net.ipv4.ip_forward", "net.bridge.bridge-nf-call-iptables"):
        _call(*_inside(), "sysctl", "--quiet", "--write", f"{switch}=1")


def _start_containerd(folder: Path) -> None:
    _spawn(folder, "containerd", "containerd", f"--config={folder / 'containerd.toml'}")
    _until("ctr", f"--address={folder / 'containerd.sock'}", "version")
    (folder / "pause.c").write_text(PAUSE_SOURCE, encoding="ascii")
    _call("gcc", "-static", "-O1", "-o", folder / "pause", folder / "pause.c")
    _call("sh", "-c", PAUSE, "sh", folder)
    import_image(folder, folder / "pause.tar")


def _start_control_plane(folder: Path, binaries: Path) -> None:
    key = folder / "tokens.key"
    _call("openssl", "genrsa", "-out", key, "2048")
    etcd = "http://127.0.0.1:2379"
    peers = "http://127.0.0.1:2380"
    _spawn(
        folder,
        "etcd",
        "etcd",
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={etcd}",
        f"--advertise-client-urls={etcd}",
        f"--listen-peer-urls={peers}",
    )
    flags = [f"--etcd-servers={etcd}", f"--cert-dir={folder / 'certificates'}"]
    flags += [f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"]
    flags += [f"--token-auth-file={folder / 'tokens.csv'}"]
    _spawn(folder, "kube-apiserver", binaries / "kube-apiserver", *flags, *API_SERVER)
    kubeconfig = f"--kubeconfig={folder / 'kubeconfig'}"
    _until("kubectl", kubeconfig, "get", "namespace", "default")
    authority = f"--root-ca-file={folder / 'certificates' / 'apiserver.crt'}"
    for program, own in (
        ("kube-controller-manager", [authority, f"--service-account-private-key-file={key}"]),
        ("kube-scheduler", []),
    ):
        common = [kubeconfig, f"--cert-dir={folder / program}", "--leader-elect=false", "--port=0"]
        _spawn(folder, program, binaries / program, *common, *own)


def _kubelet_flags(folder: Path) -> list[str]:
    socket = f"unix://{folder / 'containerd.sock'}"
    return [
        f"--kubeconfig={folder / 'kubeconfig'}",
        f"--root-dir={folder / 'kubelet'}",
        f"--cert-dir={folder / 'kubelet-certificates'}",
        "--container-runtime=remote",
        f"--container-runtime-endpoint={socket}",
        f"--image-service-endpoint={socket}",
        "--hostname-override=node-0",
        f"--node-ip={ADDRESS}",
    ]


def _inside() -> list[str]:
    """Not `ip netns exec`, which hides the cgroups' mounts."""
    return ["nsenter", f"--net=/run/netns/{SPACE}"]


def _call(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def _spawn(folder: Path, name: str, *command: object) -> None:
    """A daemon in the node's network; its words go to NAME.log."""
    words = [*_inside(), *map(str, command)]
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    (folder / f"{name}.pid").write_text(str(process.pid), encoding="ascii")


def _until(*command: object) -> None:
    """It succeeds."""
    words = [*_inside(), *map(str, command)]
    deadline = time.monotonic() + _PATIENCE
    while (done := subprocess.run(words, capture_output=True, text=True)).returncode != 0:
        if time.monotonic() > deadline:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
        time.sleep(0.5)


def _processes() -> list[int]:
    """Those of pods, and all others whose network is the node's."""
    found: set[int] = set()
    for listed in CGROUPS.glob("*/kubepods/**/cgroup.procs"):
        found |= {int(pid) for pid in listed.read_text(encoding="ascii").split()}
    with suppress(FileNotFoundError):
        ours = Path("/run/netns", SPACE).stat().st_ino
        for entry in Path("/proc").glob("[0-9]*/ns/net"):
            with suppress(OSError):
                if entry.stat().st_ino == ours:
                    found.add(int(entry.parts[2]))
    return sorted(found - {os.getpid()})


def _end(pids: list[int]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + 10
        while any(map(_lives, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["start", folder, binaries]:
            start(Path(folder).absolute(), Path(binaries).absolute())
        case ["import", folder, archive]:
            import_image(Path(folder).absolute(), Path(archive))
        case ["run", folder, *command] if command:
            run(Path(folder).absolute(), *command)
        case ["stop", folder]:
            stop(Path(folder).absolute())
        case _:
            raise SystemExit(__doc__)
