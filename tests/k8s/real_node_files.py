"""What the programs of a real node are told."""

import json
from pathlib import Path

ADDRESS = "172.31.250.1"
DNS = "10.96.0.10"
API_SERVER = (
    "--bind-address=0.0.0.0",
    "--secure-port=6443",
    f"--advertise-address={ADDRESS}",
    "--authorization-mode=Node,RBAC",
    "--service-cluster-ip-range=10.96.0.0/16",
    "--service-account-issuer=https://kubernetes.default.svc",
    "--allow-privileged",
    "--kubelet-preferred-address-types=InternalIP",
)
PAUSE_SOURCE = """#include <signal.h>
#include <unistd.h>
static void end(int number) { _exit(0); }
int main(void) { signal(SIGTERM, end); signal(SIGCHLD, SIG_IGN); for (;;) pause(); }
"""
PAUSE = """cd "$1" && printf 'FROM scratch\\nCOPY pause /pause\\nENTRYPOINT ["/pause"]\\n' > Pause &&
BUILDAH_ISOLATION=chroot buildah bud --quiet -f Pause -t localhost/pause:1 . &&
buildah push --quiet localhost/pause:1 "docker-archive:$1/pause.tar:localhost/pause:1"
"""
"""The image that holds a pod's namespaces, from the folder with its program."""


def files(folder: Path) -> dict[str, str]:
    """Name in the folder → text."""
    return {
        "tokens.csv": "administrator-of-a-test,admin,admin,system:masters\n",
        "kubeconfig": json.dumps(_kubeconfig(folder)),
        "containerd.toml": _CONTAINERD.format(folder=folder),
        "cni/10-pods.conflist": json.dumps(_network(folder)),
        "kubelet.yaml": _KUBELET.format(folder=folder, address=ADDRESS, dns=DNS),
        "proxy.yaml": _PROXY.format(folder=folder),
        "dns.yaml": _DNS.format(address=ADDRESS, dns=DNS),
    }


def _kubeconfig(folder: Path) -> dict[str, object]:
    cluster = {"server": f"https://{ADDRESS}:6443", "certificate-authority": f"{folder}/certificates/apiserver.crt"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "node", "cluster": cluster}],
        "users": [{"name": "node", "user": {"token": "administrator-of-a-test"}}],
        "contexts": [{"name": "node", "context": {"cluster": "node", "user": "node"}}],
        "current-context": "node",
    }


def _network(folder: Path) -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "dataDir": f"{folder}/addresses",
        "ranges": [[{"subnet": "10.244.0.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipam": addresses}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}


_CONTAINERD = """version = 2
root = "{folder}/images"
state = "{folder}/containers"
[grpc]
address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
sandbox_image = "localhost/pause:1"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{folder}/cni"
"""
_KUBELET = """apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {address}
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
cgroupDriver: cgroupfs
failSwapOn: false
maxOpenFiles: 20000
clusterDNS: ["{dns}"]
clusterDomain: cluster.local
resolvConf: ""
volumePluginDir: {folder}/plugins
evictionHard: {{memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%"}}
imageGCHighThresholdPercent: 100
"""
_PROXY = """apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clusterCIDR: 10.244.0.0/16
hostnameOverride: node-0
clientConnection: {{kubeconfig: "{folder}/kubeconfig"}}
conntrack: {{maxPerCore: 0, min: 0}}
"""
_DNS = """apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system, labels: {{k8s-app: kube-dns}}}}
spec:
  clusterIP: {dns}
  ports: [{{name: dns, port: 53, protocol: UDP}}]
---
apiVersion: v1
kind: Endpoints
metadata: {{name: kube-dns, namespace: kube-system}}
subsets: [{{addresses: [{{ip: {address}}}], ports: [{{name: dns, port: 53, protocol: UDP}}]}}]
"""
