"""Where the programs of a control plane are: a folder outside the checkout, which `make control-plane` fills.

`python -m tests.k8s.binaries` prints it.
"""

import os
from pathlib import Path

VERSION = "1.20.2"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


def folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pdserve" / "kubernetes" / VERSION


def missing() -> str:
    """What to do when there is no control plane here; empty when there is one."""
    lacking = [program for program in PROGRAMS if not (folder() / program).exists()]
    if not lacking:
        return ""
    return (
        f"no cluster: {folder()} lacks {', '.join(lacking)}. Set KUBECONFIG to a cluster of yours, or run "
        f"`make control-plane`, which builds Kubernetes {VERSION} from Debian 12's sources in about 9 minutes (as root)"
    )


if __name__ == "__main__":
    print(folder())
