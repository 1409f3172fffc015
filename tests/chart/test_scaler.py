"""The scaler of a release: what decides, by which policy, with which rights, and that an upgrade does not undo it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import pdserve
from deploy.chart import Manifest, overlaid, render
from pdserve.cluster.k8s.rights import NODE_RIGHTS, SCALER_RIGHTS, Right
from tests.chart.manifests import config_file, deciders, named, of_kind, pods
from tests.chart.test_render import MATRIX, POLICIES

HOLD_PODS = {"none": "statefulsets/scale", "builtin": "statefulsets/scale", "kuberay": "rayclusters"}
MODES = tuple(HOLD_PODS)


def scaled(mode: str) -> dict[str, Any]:
    return {"policies": POLICIES, "ray": {"mode": mode}}


def decider(mode: str) -> str:
    return "pdserve-scaler" if mode == "none" else "pdserve-router"


@pytest.mark.parametrize("mode", MODES)
def test_it_has_the_rights_it_uses_and_no_others(mode: str) -> None:
    """Of the kinds that hold pods that of the release, and there only its own objects."""
    manifests = render(scaled(mode))
    (role,), (binding,) = of_kind(manifests, "Role"), of_kind(manifests, "RoleBinding")
    others = {"deployments/scale", "leaderworkersets/scale", *HOLD_PODS.values()} - {HOLD_PODS[mode]}
    called = {right for right in (SCALER_RIGHTS if mode == "none" else NODE_RIGHTS) if right.resource not in others}
    assert sorted(right for right, _ in granted(manifests)) == sorted(called)
    for right, names in granted(manifests):
        assert bool(names) == (right.verb in ("get", "patch", "update")), "objects whose names are known are named"
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "Role",
        "name": role["metadata"]["name"],
    }
    assert deciders(manifests) == {decider(mode)}

    told = config_file(manifests, "scaler.yaml" if mode == "none" else "router.yaml")["scaler"]["kubernetes"]
    targets = {told[role].split("/")[1] for role in ("prefill", "decode")}
    assert targets == _names(granted(manifests), HOLD_PODS[mode])
    assert targets <= {manifest["metadata"]["name"] for manifest in of_kind(manifests, "StatefulSet", "RayCluster")}
    assert _names(granted(manifests), "leases") == ({told["lease"]} if mode == "none" else set())


def granted(manifests: list[Manifest]) -> list[tuple[Right, tuple[str, ...]]]:
    """What the release's Role grants, and on objects of which names."""
    (role,) = of_kind(manifests, "Role")
    return [
        (Right(group, resource, verb), tuple(rule.get("resourceNames", ())))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def _names(rights: list[tuple[Right, tuple[str, ...]]], resource: str) -> set[str]:
    return {name for right, names in rights for name in names if right.resource == resource}


def test_without_a_policy_nobody_has_rights() -> None:
    for name, values in MATRIX.items():
        kinds = {manifest["kind"] for manifest in render(values)}
        assert (not values.get("policies")) == kinds.isdisjoint({"Role", "RoleBinding"}), name


def test_only_the_client_of_the_kubernetes_api_imports_it() -> None:
    """Whoever else called it would need a Role of its own."""
    sources = Path(pdserve.__file__).parent.rglob("*.py")
    calling = [path.name for path in sources if {"import kubernetes", "from kubernetes"} & _imports(path)]
    assert calling == ["client.py"]


def _imports(path: Path) -> set[str]:
    return {" ".join(line.split()[:2]).partition(".")[0] for line in path.read_text(encoding="utf-8").splitlines()}


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_reaches_who_decides_as_it_is_and_is_mounted_as_a_folder(mode: str) -> None:
    """A file of its own, mounted by subPath, would never change."""
    manifests = render(scaled(mode))
    text = named(manifests, "ConfigMap", "pdserve-policies")["data"]["policies.yaml"]
    assert yaml.safe_load(text) == POLICIES
    config = config_file(manifests, "scaler.yaml" if mode == "none" else "router.yaml")
    assert config["policies"] == "/etc/pdserve/policies/policies.yaml"
    spec = dict(pods(manifests))[decider(mode)]["spec"]
    (mount,) = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "policies"]
    assert mount == {"name": "policies", "mountPath": "/etc/pdserve/policies", "readOnly": True}
    assert {"name": "policies", "configMap": {"name": "pdserve-policies"}} in spec["volumes"]


@pytest.mark.parametrize("mode", MODES)
def test_another_policy_restarts_nothing(mode: str) -> None:
    before = dict(pods(render(scaled(mode))))
    after = dict(pods(render(overlaid(scaled(mode), {"policies": {"total": 9}}))))
    assert before == after


def test_routers_report_to_the_one_that_listens() -> None:
    manifests = render(scaled("none"))
    service = named(manifests, "Service", "pdserve-scaler")["spec"]
    assert service["clusterIP"] == "None", "who stands by is resolved as well, and does not listen"
    assert config_file(manifests, "router.yaml")["scaler"] == {"address": "pdserve-scaler.pdserve.svc:8103"}
    assert "policies" not in config_file(manifests, "router.yaml")
    container = dict(pods(manifests))["pdserve-scaler"]["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"]["path"] == "/live", "no rollout waits for one that stands by"


def test_an_upgrade_sets_no_number_of_pods_that_a_scaler_has_set() -> None:
    for values in (scaled("none"), MATRIX["HPA"], MATRIX["KEDA"]):
        for pool in _pools(render(values)):
            assert "replicas" not in pool["spec"]
            assert pool["metadata"]["annotations"] == {"pdserve.dev/replicas": "theirs"}
    for pool in _pools(render({})):
        assert pool["spec"]["replicas"] == 1
        assert "annotations" not in pool["metadata"]


@pytest.mark.parametrize("mode", ["builtin", "kuberay"])
def test_as_many_ray_nodes_as_engines_are_there_at_first(mode: str) -> None:
    """Without them the first engines would have no place, and nobody would scale."""
    values = overlaid(scaled(mode), {"prefill": {"replicas": 3}, "decode": {"replicas": 2}})
    manifests = render(values)
    config = config_file(manifests, "router.yaml")
    if mode == "builtin":
        nodes = {pool["metadata"]["name"].split("-")[-1]: pool["spec"]["replicas"] for pool in _pools(manifests)}
    else:
        groups = named(manifests, "RayCluster", "pdserve-ray")["spec"]["workerGroupSpecs"]
        nodes = {group["groupName"]: group["replicas"] for group in groups}
    assert nodes == {role: pool["engines"] for role, pool in config["pools"].items()} == {"prefill": 3, "decode": 2}


def _pools(manifests: list[Manifest]) -> list[Manifest]:
    return [named(manifests, "StatefulSet", f"pdserve-{role}") for role in ("prefill", "decode")]


def test_nobody_but_routers_and_monitoring_reaches_a_scaler_and_it_reaches_the_api_only() -> None:
    policy = named(render(scaled("none")), "NetworkPolicy", "pdserve-scaler")["spec"]
    routers, monitoring = policy["ingress"]
    assert routers["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert (routers["ports"][0]["port"], monitoring["ports"][0]["port"]) == ("scaler", "probes")
    _dns, api = policy["egress"]
    assert "to" not in api
    assert [rule["port"] for rule in api["ports"]] == [443, 6443]
    router = named(render(scaled("builtin")), "NetworkPolicy", "pdserve-router")["spec"]
    assert {"ports": api["ports"]} in router["egress"]
    closed = named(render(MATRIX["external Redis"]), "NetworkPolicy", "pdserve-scaler")["spec"]["egress"][1]
    assert closed == {
        "ports": [{"port": 6443, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
    }


def test_monitoring_finds_who_decides_and_who_stands_by() -> None:
    manifests = render(MATRIX["policies"])
    selector = named(manifests, "ServiceMonitor", "pdserve")["spec"]["selector"]
    (expression,) = selector["matchExpressions"]
    scraped = [
        service["metadata"]["name"]
        for service in of_kind(manifests, "Service")
        if service["metadata"]["labels"]["app.kubernetes.io/component"] in expression["values"]
    ]
    assert scraped == ["pdserve-admin", "pdserve-scaler"]
    for name in scraped:
        ports = named(manifests, "Service", name)["spec"]["ports"]
        assert "admin" in {port["name"] for port in ports}
