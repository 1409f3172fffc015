"""Engines whose ranks are on several pods: a LeaderWorkerSet in place of a StatefulSet."""

from copy import deepcopy
from typing import Any

import pytest

from deploy.chart import Manifest, overlaid, render
from tests.chart import leader_worker_set
from tests.chart.manifests import config_file, named, of_kind, pods, selects
from tests.chart.test_render import MATRIX, POLICIES
from tests.chart.test_scaler import granted

ONE: dict[str, Any] = {"config": {"pools": {"decode": {"tensor_parallel": 4}}}}
TWO = overlaid(ONE, {"config": {"pools": {"decode": {"hosts": 2}}}})
"""Of decode; prefill engines have one."""


def group(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = named(manifests, "LeaderWorkerSet", "pdserve-decode")["spec"]
    return spec


def container(template: dict[str, Any]) -> dict[str, Any]:
    (found,) = template["spec"]["containers"]
    return dict(found)


def test_only_pools_of_several_hosts_are_leader_worker_sets() -> None:
    manifests = render(overlaid(TWO, {"decode": {"replicas": 3}}))
    assert [each["metadata"]["name"] for each in of_kind(manifests, "StatefulSet")] == ["pdserve-prefill"]
    spec = group(manifests)
    assert (spec["replicas"], spec["leaderWorkerTemplate"]["size"]) == (3, 2)
    assert of_kind(render(ONE), "LeaderWorkerSet") == []


def test_a_leader_is_the_engine_and_other_hosts_dial_it() -> None:
    template = group(render(TWO))["leaderWorkerTemplate"]
    leader, host = container(template["leaderTemplate"]), container(template["workerTemplate"])
    whole = container(named(render(ONE), "StatefulSet", "pdserve-decode")["spec"]["template"])
    assert leader["args"] == [*whole["args"], "--gang-port", "8102"]
    assert {"name": "gang", "containerPort": 8102, "protocol": "TCP"} in leader["ports"]
    told = dict(zip(host["args"][2::2], host["args"][3::2], strict=True))
    assert host["args"][:2] == ["rank-host", whole["args"][1]]
    assert told == {
        "--index": "$(LWS_WORKER_INDEX)",
        "--leader": "$(LWS_LEADER_ADDRESS):8102",
        "--host": "$(POD_IP)",
        "--probe-port": "8101",
    }
    for each in (leader, host):
        assert not {entry["name"] for entry in each["env"]} & set(leader_worker_set.VARIABLES)


def test_pods_of_a_group_are_otherwise_as_those_of_one_host() -> None:
    template = group(render(TWO))["leaderWorkerTemplate"]
    expected = _bare(named(render(ONE), "StatefulSet", "pdserve-decode")["spec"]["template"])
    assert _bare(template["leaderTemplate"]) == _bare(template["workerTemplate"]) == expected


def _bare(template: dict[str, Any]) -> dict[str, Any]:
    """Without what tells leaders, other hosts and whole engines apart."""
    bare = deepcopy(template)
    del bare["metadata"]["annotations"]["checksum/config"]
    bare["metadata"]["labels"].pop("pdserve.dev/engine-leader", None)
    for key in ("args", "ports", "startupProbe", "readinessProbe"):
        del bare["spec"]["containers"][0][key]
    return bare


def test_a_host_that_waits_for_its_leader_lives_and_is_not_ready() -> None:
    template = group(render(TWO))["leaderWorkerTemplate"]
    paths = {
        name: tuple(container(template[name])[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe"))
        for name in ("leaderTemplate", "workerTemplate")
    }
    assert paths == {"leaderTemplate": ("/ready", "/ready"), "workerTemplate": ("/live", "/ready")}


def test_routers_have_found_a_group_before_the_next_is_replaced() -> None:
    spec = group(render(TWO))
    ready = container(spec["leaderWorkerTemplate"]["leaderTemplate"])["readinessProbe"]
    assert ready["periodSeconds"] * (ready["successThreshold"] - 1) >= 30
    assert spec["rolloutStrategy"]["rollingUpdateConfiguration"] == {"maxUnavailable": 1, "maxSurge": 0}
    at_once = render(overlaid(TWO, {"probes": {"minReadySeconds": 0}}))
    leader = container(group(at_once)["leaderWorkerTemplate"]["leaderTemplate"])
    assert "successThreshold" not in leader["readinessProbe"]


def test_routers_find_leaders_only_and_by_names_of_their_own() -> None:
    manifests = render(TWO)
    service, template = named(manifests, "Service", "pdserve-decode")["spec"], group(manifests)["leaderWorkerTemplate"]
    assert selects(service["selector"], template["leaderTemplate"])
    assert not selects(service["selector"], template["workerTemplate"])
    assert group(manifests)["networkConfig"] == {"subdomainPolicy": "UniquePerReplica"}, "its name is the Service's"
    whole = named(manifests, "Service", "pdserve-prefill")["spec"]["selector"]
    assert selects(whole, named(manifests, "StatefulSet", "pdserve-prefill")["spec"]["template"])


def test_ranks_reach_each_other_and_find_their_leader_by_name() -> None:
    def egress(values: dict[str, Any]) -> list[dict[str, Any]]:
        rules: list[dict[str, Any]] = named(render(values), "NetworkPolicy", "pdserve-engine")["spec"]["egress"]
        return rules

    to_engines, to_names = egress(TWO)
    assert [rule["port"] for rule in to_names["ports"]] == [53, 53]
    assert "ports" not in to_engines
    for name in ("leaderTemplate", "workerTemplate"):
        assert selects(
            to_engines["to"][0]["podSelector"]["matchLabels"], group(render(TWO))["leaderWorkerTemplate"][name]
        )
    assert egress(ONE) == [to_engines], "who asks no name has no name server"


@pytest.mark.parametrize(
    ("given", "hosts", "allowed"),
    [(1, 2, 1), (2, 4, 2), ("50%", 2, "25%"), ("25%", 4, "6%"), ("1%", 4, "1%"), ("0%", 2, "0%"), ("25%", 1, "25%")],
)
def test_disruptions_take_no_more_engines_than_they_may(given: int | str, hosts: int, allowed: int | str) -> None:
    pools = {"config": {"pools": {"decode": {"tensor_parallel": 4, "hosts": hosts}}}}
    manifests = render(overlaid(pools, {"decode": {"maxUnavailable": given}}))
    budget = named(manifests, "PodDisruptionBudget", "pdserve-decode")["spec"]
    assert budget["maxUnavailable"] == allowed
    for name, pod in pods(manifests):
        assert selects(budget["selector"]["matchLabels"], pod) == name.startswith("pdserve-decode")


def test_the_scaler_may_scale_groups_and_pods_each_by_their_own_kind() -> None:
    manifests = render(overlaid(TWO, {"policies": POLICIES}))
    told = config_file(manifests, "scaler.yaml")["scaler"]["kubernetes"]
    assert (told["prefill"], told["decode"]) == ("StatefulSet/pdserve-prefill", "LeaderWorkerSet/pdserve-decode")
    rights = {(right.resource, right.verb): names for right, names in granted(manifests)}
    for verb in ("get", "patch"):
        assert rights["statefulsets/scale", verb] == ("pdserve-prefill",)
        assert rights["leaderworkersets/scale", verb] == ("pdserve-decode",)
    both = {right.resource for right, _ in granted(render(MATRIX["several hosts"]))}
    assert "leaderworkersets/scale" in both
    assert "statefulsets/scale" not in both


def test_an_upgrade_sets_no_number_of_groups_that_a_scaler_has_set() -> None:
    decode = named(render(overlaid(TWO, {"policies": POLICIES})), "LeaderWorkerSet", "pdserve-decode")
    assert "replicas" not in decode["spec"]
    assert decode["metadata"]["annotations"] == {"pdserve.dev/replicas": "theirs"}


@pytest.mark.parametrize("name", ["HPA", "KEDA"])
def test_other_scalers_are_led_to_the_set(name: str) -> None:
    manifests = render(overlaid(TWO, MATRIX[name]))
    scalers = of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    references = [scaler["spec"]["scaleTargetRef"] for scaler in scalers]
    assert references == [
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "pdserve-prefill"},
        {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": "pdserve-decode"},
    ]


def test_no_group_is_kept_out_of_the_domain_all_engines_are_to_share() -> None:
    decode = named(render(MATRIX["several hosts"]), "LeaderWorkerSet", "pdserve-decode")
    assert "leaderworkerset.sigs.k8s.io/exclusive-topology" not in decode["metadata"]["annotations"]
    for name in ("leaderTemplate", "workerTemplate"):
        pod = decode["spec"]["leaderWorkerTemplate"][name]
        (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "example.com/nvlink"
        assert selects(term["labelSelector"]["matchLabels"], pod)


@pytest.mark.parametrize("mode", ["builtin", "kuberay"])
def test_on_ray_there_is_a_node_for_each_host(mode: str) -> None:
    manifests = render(overlaid(TWO, {"ray": {"mode": mode}, "decode": {"replicas": 3}}))
    if mode == "builtin":
        nodes = named(manifests, "StatefulSet", "pdserve-decode")["spec"]["replicas"]
    else:
        groups = named(manifests, "RayCluster", "pdserve-ray")["spec"]["workerGroupSpecs"]
        (nodes,) = [each["replicas"] for each in groups if each["groupName"] == "decode"]
    assert nodes == 6
    assert config_file(manifests, "router.yaml")["pools"]["decode"]["engines"] == 3
    assert of_kind(manifests, "LeaderWorkerSet") == []
