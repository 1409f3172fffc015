"""What the chart renders is what Kubernetes takes, holds together, and is what pdserve takes."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy import generate
from deploy.chart import CHART, Manifest, lint, notes, overlaid, render, values_file
from pdserve.config.load import load_config
from pdserve.config.schema import Config
from pdserve.config.times import Times
from pdserve.core.endpoint import Role
from pdserve.scaler.load import load_policy
from tests.chart import leader_worker_set
from tests.chart.manifests import deciders, named, of_kind, pods, secrets_of, selects

OLDEST, NEWEST = "1.25", "1.37"
THEIR_SECRETS = {("Secret", name) for name in ("keys", "token", "redis", "pdserve-api-keys", "pdserve-redis")}
"""Those that values name."""
FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "RayCluster"}
"""Kinds that operators bring."""

GPU = {
    "gpus": 8,
    "rdma": {"resource": "rdma/hca", "count": 8},
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
}
MONITORING = {name: {"enabled": True} for name in ("serviceMonitor", "rules", "dashboard")}
POLICIES = {
    "slo": {"ttft": {"seconds": 1.5}},
    "timezone": "Europe/Berlin",
    "pools": {
        "prefill": {
            "min": 1,
            "max": 6,
            "schedules": [{"days": ["sat", "sun"], "start": "08:00", "end": "20:00", "max": 3}],
        },
        "decode": {"min": 2, "max": 8, "targets": {"queue": None}, "reactive": {"dead_band": [0.5, 1]}},
    },
    "total": 12,
}
ROUTERS_ALONE = {
    "admission": {"headroom": 0.9},
    "idempotency": {"keep": 60},
    "limits": {"max_chat_tokens": 64},
    "replay": {"max_attempts": 2},
    "routing": {"policy": "prefix"},
    "slo": {"ttft": 1.5},
    "telemetry": {"vllm_names": True},
    "tenants": [{"name": "team", "keys": ["sha256:" + 64 * "0"]}],
    "workers": 2,
}
"""Settings that no engine and no scaler reads."""
ON_DEMAND = {"metric": "backlog", "targetAverageValue": "4k"}
MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cpu-demo": values_file("cpu-demo"),
    "h200": values_file("h200"),
    "production": overlaid(values_file("h200"), values_file("production")),
    "builtin Ray": {"ray": {"mode": "builtin"}, "prefill": GPU, "config": {"pools": {"prefill": {"max_rows": 8}}}},
    "KubeRay": {"ray": {"mode": "kuberay"}, "decode": GPU},
    "own secrets": {"auth": {"existingSecret": "keys"}, "ray": {"mode": "builtin", "existingSecret": "token"}},
    "claim": {"model": {"source": "pvc", "path": "qwen3-8b", "pvc": {"claimName": "models"}}},
    "host path": {"model": {"source": "hostPath", "path": "a/b", "hostPath": {"path": "/mnt/models"}}},
    "image volume": {"model": {"source": "image", "name": "m", "image": {"reference": "registry/model:1"}}},
    "download": {
        "model": {
            "source": "download",
            "path": "m",
            "download": {"image": "s3", "command": ["sync"], "args": ["a", "b"]},
        }
    },
    "one domain": {"placement": {"domain": "required", "domainLabel": "example.com/nvlink"}, "decode": GPU},
    "preferred domain": {"placement": {"domain": "preferred", "domainLabel": "example.com/rail"}},
    "HPA": {"hpa": {"enabled": True, "prefill": ON_DEMAND, "decode": ON_DEMAND}},
    "KEDA": {"keda": {"enabled": True, "serverAddress": "http://prometheus:9090"}, "monitoring": MONITORING},
    "policies": {"policies": POLICIES, "monitoring": MONITORING},
    "policies on Ray": {"policies": POLICIES, "ray": {"mode": "builtin"}, "monitoring": MONITORING},
    "policies on KubeRay": {"policies": POLICIES, "ray": {"mode": "kuberay"}, "redis": {"mode": "bundled"}},
    "several hosts": {
        "config": {
            "pools": {"prefill": {"tensor_parallel": 2, "hosts": 2}, "decode": {"tensor_parallel": 8, "hosts": 4}}
        },
        "prefill": GPU,
        "decode": {"maxUnavailable": "50%"},
        "placement": {"domain": "required", "domainLabel": "example.com/nvlink"},
        "policies": POLICIES,
    },
    "several hosts, one pool": {
        "config": {"pools": {"decode": {"tensor_parallel": 2, "hosts": 2}}},
        "keda": {"enabled": True, "serverAddress": "http://prometheus:9090"},
    },
    "several hosts on Ray": {
        "config": {"pools": {"decode": {"tensor_parallel": 2, "hosts": 2}}},
        "ray": {"mode": "builtin"},
    },
    "bundled Redis": {"redis": {"mode": "bundled"}, "model": {"source": "pvc", "path": "m", "pvc": {"claimName": "c"}}},
    "external Redis": {
        "redis": {
            "mode": "external",
            "existingSecret": "redis",
            "external": {"port": 6380, "peers": [{"ipBlock": {"cidr": "10.2.0.7/32"}}]},
        },
        "networkPolicy": {"apiServer": {"peers": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [6443]}},
        "policies": POLICIES,
    },
    "open": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "closed": {"networkPolicy": {"clients": [{"podSelector": {}}], "monitoring": []}, "nameOverride": "llm"},
    "tenants": {
        "config": {"tenants": [{"name": "team", "keys": ["sha256:" + 64 * "0"]}], "times": {"drain_timeout": 90.5}},
        "drain": {"gracePeriodSeconds": 200, "preStopSeconds": 0},
    },
}


@pytest.fixture(scope="module", params=MATRIX)
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MATRIX[request.param]


@pytest.fixture(scope="module")
def manifests(values: dict[str, Any]) -> list[Manifest]:
    return render(values)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_lint_has_no_complaint(values: dict[str, Any], version: str) -> None:
    assert lint(values, f"{version}.0") == []


_VALID: set[tuple[str, str]] = set()
"""(version, object) that were looked at: most objects are the same for many values."""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_one_of_kubernetes(values: dict[str, Any], version: str) -> None:
    for manifest in render(values, kube_version=f"{version}.0"):
        if manifest["kind"] in FOREIGN or (version, str(manifest)) in _VALID:
            continue
        if manifest["kind"] == "LeaderWorkerSet":
            leader_worker_set.validate(manifest, version)
            continue
        if version == OLDEST and "image" in str(
            [v for _, pod in pods([manifest]) for v in pod["spec"].get("volumes", [])]
        ):
            continue  # image volumes are younger
        kubernetes_validate.validate(manifest, version, strict=True)
        _VALID.add((version, str(manifest)))


def test_what_is_named_is_there(manifests: list[Manifest]) -> None:
    """Accounts, ConfigMaps, Secrets, ports and labels: a name that nobody has is noticed only in a cluster."""
    existing = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    templates = dict(pods(manifests))
    for name, pod in templates.items():
        spec = pod["spec"]
        assert ("ServiceAccount", spec["serviceAccountName"]) in existing
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in existing
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in existing | THEIR_SECRETS
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys(), name
            assert {("Secret", secret) for secret in secrets_of(container)} <= existing | THEIR_SECRETS
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if get := container.get(probe, {}).get("httpGet"):
                    assert get["port"] in ports
    for service in of_kind(manifests, "Service"):
        chosen = [pod for pod in templates.values() if selects(service["spec"]["selector"], pod)]
        assert len(chosen) == 1, service["metadata"]["name"]
        ports = {port["name"] for port in chosen[0]["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert any(selects(budget["spec"]["selector"]["matchLabels"], pod) for pod in templates.values())
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        assert selects(workload["spec"]["selector"]["matchLabels"], workload["spec"]["template"])
        if "serviceName" in workload["spec"] and workload["metadata"]["name"].endswith("-ray-head"):
            assert ("Service", workload["spec"]["serviceName"]) in existing


def test_pods_have_no_more_rights_than_they_need(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is (name in deciders(manifests)), name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = container.get("volumeMounts", [])
            written = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
            assert written <= {"/tmp", "/dev/shm", "/models"}
            assert "/models" not in written or container["name"] == "model"
    assert of_kind(manifests, "ClusterRole", "ClusterRoleBinding") == []


def test_quantities_and_ports_are_what_old_servers_take(manifests: list[Manifest]) -> None:
    """Server-side apply of Kubernetes 1.20 wants quantities to be strings and every port to name its protocol."""
    for _, pod in pods(manifests):
        for container in pod["spec"]["containers"]:
            assert all("protocol" in port for port in container.get("ports", []))
            for kind in ("requests", "limits"):
                assert all(isinstance(amount, str) for amount in container["resources"].get(kind, {}).values())
    for service in of_kind(manifests, "Service"):
        assert all("protocol" in port for port in service["spec"]["ports"])


def test_pdserve_takes_the_configuration(manifests: list[Manifest], tmp_path: Path) -> None:
    files = {name: text for config in of_kind(manifests, "ConfigMap") for name, text in config["data"].items()}
    keys = tmp_path / "api-keys"
    keys.write_text("sk-something\n", encoding="utf-8")
    for name in files.keys() & {"router.yaml", "engine.yaml", "scaler.yaml"}:
        path = tmp_path / name
        path.write_text(files[name].replace("/etc/pdserve/keys/api-keys", str(keys)), encoding="utf-8")
        loaded = load_config(path)
        if name == "router.yaml":
            assert loaded.host == "0.0.0.0"
            assert bool(loaded.discovery.engines) != bool(loaded.ray.address)
        else:
            assert "api" not in files[name], "neither engines nor scalers know keys"
    if "policies.yaml" in files:
        (tmp_path / "policies.yaml").write_text(files["policies.yaml"], encoding="utf-8")
        load_policy(tmp_path / "policies.yaml")


def test_pods_have_time_to_drain_and_to_load(values: dict[str, Any], manifests: list[Manifest]) -> None:
    times = {"drain_timeout": 30.0, "start_timeout": 300.0, **values.get("config", {}).get("times", {})}
    for name, pod in pods(manifests):
        if name.endswith(("-test", "-redis", "-scaler")):
            continue  # nothing drains there, and nothing is loaded
        spec = pod["spec"]
        pause = max([int(_pre_stop(container)) for container in spec["containers"]])
        assert spec["terminationGracePeriodSeconds"] >= pause + times["drain_timeout"] + 10, name
        for container in spec["containers"]:
            probe = container.get("startupProbe", {})
            if "httpGet" in probe:
                assert probe["periodSeconds"] * probe["failureThreshold"] > times["start_timeout"]


def test_routers_have_found_an_engine_before_the_next_is_replaced() -> None:
    """A name server may go on saying for 30 s (CoreDNS as kubeadm sets it up) that a new pod is not there."""
    manifests = render({})
    for pool in ("pdserve-prefill", "pdserve-decode"):
        assert named(manifests, "StatefulSet", pool)["spec"]["minReadySeconds"] >= 30


def test_budgets_are_only_for_pods_whose_number_kubernetes_can_ask_for(manifests: list[Manifest]) -> None:
    """A RayCluster has no scale: whatever a budget says of its pods but a number that stays allows no disruption."""
    of_operator = {name for name, _ in pods(of_kind(manifests, "RayCluster"))}
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        spec = budget["spec"]
        chosen = {name for name, pod in pods(manifests) if selects(spec["selector"]["matchLabels"], pod)}
        assert isinstance(spec.get("minAvailable"), int) or not chosen & of_operator


@pytest.mark.parametrize(
    ("version", "policies"), [(OLDEST, {None}), ("1.27", {"AlwaysAllow"}), (NEWEST, {"AlwaysAllow"})]
)
def test_pods_that_are_not_ready_block_no_drain(version: str, policies: set[str | None]) -> None:
    for values in ({}, MATRIX["policies"], MATRIX["builtin Ray"], MATRIX["several hosts"]):
        budgets = of_kind(render(values, kube_version=f"{version}.0"), "PodDisruptionBudget")
        assert {budget["spec"].get("unhealthyPodEvictionPolicy") for budget in budgets} == policies


def _pre_stop(container: dict[str, Any]) -> str:
    hook = container.get("lifecycle", {}).get("preStop", {"exec": {"command": ["sleep", "0"]}})
    command: list[str] = hook["exec"]["command"]
    assert command[0] == "sleep"
    return command[1]


def test_kv_moves_between_engines_only() -> None:
    manifests = render({})
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")}
    assert policies["pdserve-default-deny"]["policyTypes"] == ["Ingress", "Egress"]
    assert policies["pdserve-default-deny"].keys() == {"podSelector", "policyTypes"}
    engine = policies["pdserve-engine"]
    engines = engine["podSelector"]["matchLabels"]
    sources = [rule["from"][0]["podSelector"]["matchLabels"] for rule in engine["ingress"]]
    assert sources[0]["app.kubernetes.io/component"] == "router"
    assert engine["ingress"][0]["ports"] == [{"port": "engine", "protocol": "TCP"}]
    assert sources[1] == engines
    assert [rule["to"][0]["podSelector"]["matchLabels"] for rule in engine["egress"]] == [engines]
    for name, pod in pods(manifests):
        assert selects(engines, pod) == (name in ("pdserve-prefill", "pdserve-decode"))
        assert selects(policies["pdserve-default-deny"]["podSelector"]["matchLabels"], pod)


def test_gpus_and_network_devices_are_requested_and_limited_alike() -> None:
    spec = named(render({"decode": GPU}), "StatefulSet", "pdserve-decode")["spec"]["template"]["spec"]
    resources = spec["containers"][0]["resources"]
    devices = {"nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert devices.items() <= resources["requests"].items()
    assert devices.items() <= resources["limits"].items()
    assert (resources["requests"]["memory"], resources["limits"]["memory"]) == ("2Gi", "8Gi")


def test_a_change_for_routers_only_restarts_no_engine() -> None:
    def checksums(config: dict[str, Any]) -> dict[str, str]:
        manifests = render({"policies": POLICIES, "config": config})[:-1]
        return {name: pod["metadata"]["annotations"]["checksum/config"] for name, pod in pods(manifests)}

    def restarted(config: dict[str, Any]) -> set[str]:
        return {name for name, checksum in checksums(config).items() if checksum != before[name]}

    before = checksums({})
    for setting, value in ROUTERS_ALONE.items():
        assert restarted({setting: value}) == {"pdserve-router"}, setting
    assert restarted({"max_model_len": 64}) == before.keys() > {"pdserve-router", "pdserve-scaler", "pdserve-decode"}


def test_routers_are_told_what_they_alone_read() -> None:
    files = named(render({"config": ROUTERS_ALONE}), "ConfigMap", "pdserve-config")["data"]
    told = yaml.safe_load(files["router.yaml"])
    assert {setting: told[setting] for setting in ROUTERS_ALONE} == ROUTERS_ALONE


def test_ray_places_every_engine_on_a_node_of_its_pool() -> None:
    manifests = render({"ray": {"mode": "builtin"}, "prefill": {"replicas": 3}, "decode": {"replicas": 2}})
    config = yaml.safe_load(named(manifests, "ConfigMap", "pdserve-config")["data"]["router.yaml"])
    for role, count in (("prefill", 3), ("decode", 2)):
        pool = named(manifests, "StatefulSet", f"pdserve-{role}")["spec"]
        assert config["pools"][role]["engines"] == pool["replicas"] == count
        assert config["pools"][role]["placement"]["resources"] == {f"pdserve_{role}": 1}
        assert f"pdserve_{role}" in pool["template"]["spec"]["containers"][0]["args"][0]
    router = named(manifests, "Deployment", "pdserve-router")["spec"]
    assert router["replicas"] == 1
    assert router["strategy"] == {"type": "Recreate"}


def test_what_is_generated_is_as_it_would_be_generated() -> None:
    assert generate.stale() == [], "run python -m deploy.generate"


def test_the_charts_defaults_are_the_programs() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    for name, seconds in defaults["config"]["times"].items():
        assert getattr(Times(), name) == seconds
    for role in (Role.PREFILL, Role.DECODE):
        assert defaults[role.value]["replicas"] == Config().pools.by_role()[role].engines


def test_notes_tell_how_to_ask_and_to_test() -> None:
    told = notes({}, name="demo", namespace="llm")
    assert "curl -N http://127.0.0.1:8000/v1/completions" in told
    assert "helm test demo --namespace llm" in told
    assert "get secret demo-pdserve-api-keys" in told
    assert "policy explain" not in told
    assert "Each router counts" in told
    everything = notes({"policies": POLICIES, "redis": {"mode": "bundled"}})
    assert "engines as `policies` say" in everything
    assert "policy explain" in everything
    assert "through service/pdserve-redis" in everything
    assert "WARNING" in notes({"networkPolicy": {"enabled": False}})
