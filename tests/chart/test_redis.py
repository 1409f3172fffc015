"""What routers share: a Redis of the release, or one that values name."""

import base64
from typing import Any

import pytest

from deploy.chart import Manifest, render
from tests.chart.manifests import config_file, named, of_kind, pods
from tests.chart.test_render import MATRIX

BUNDLED: dict[str, Any] = {"redis": {"mode": "bundled"}}


def env(manifests: list[Manifest], name: str) -> dict[str, Any]:
    container = dict(pods(manifests))[name]["spec"]["containers"][0]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@pytest.mark.parametrize("mode", ["none", "builtin"])
def test_routers_are_told_the_url_with_a_password_from_the_secret_and_nobody_else_is(mode: str) -> None:
    manifests = render(BUNDLED | {"ray": {"mode": mode}})
    reference = {"secretKeyRef": {"name": "pdserve-redis", "key": "password"}}
    router = env(manifests, "pdserve-router")
    assert router["REDIS_PASSWORD"] == reference
    assert router["PDSERVE_REDIS_URL"] == "redis://:$(REDIS_PASSWORD)@pdserve-redis.pdserve.svc:6379"
    assert list(router).index("REDIS_PASSWORD") < list(router).index("PDSERVE_REDIS_URL"), "else it is not put in"
    assert env(manifests, "pdserve-redis") == {"REDISCLI_AUTH": reference}
    assert config_file(manifests, "router.yaml")["redis"] == {"namespace": "pdserve.pdserve"}
    knowing = [name for name, pod in pods(manifests) if "REDIS" in str(pod)]
    assert knowing == ["pdserve-redis", "pdserve-router"]


def test_its_password_is_made_unless_a_secret_is_named() -> None:
    first, second = (
        base64.b64decode(named(render(BUNDLED), "Secret", "pdserve-redis")["data"]["password"]).decode()
        for _ in range(2)
    )
    assert first != second
    assert len(first) == 48
    assert first.isalnum(), "it stands in a URL"
    theirs = render({"redis": {"mode": "bundled", "existingSecret": "redis"}})
    assert [secret["metadata"]["name"] for secret in of_kind(theirs, "Secret")] == ["pdserve-api-keys"]
    assert env(theirs, "pdserve-redis")["REDISCLI_AUTH"]["secretKeyRef"]["name"] == "redis"


def test_the_bundled_server_keeps_nothing_and_evicts_nothing() -> None:
    spec = named(render(BUNDLED), "Deployment", "pdserve-redis")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    (container,) = spec["template"]["spec"]["containers"]
    args = container["args"]
    told = dict(zip(args[::2], args[1::2], strict=True))
    assert (told["--save"], told["--appendonly"], told["--maxmemory-policy"]) == ("", "no", "noeviction")
    assert told["--requirepass"] == "$(REDISCLI_AUTH)"
    assert "volumeMounts" not in container


def test_only_routers_reach_the_bundled_server_and_it_reaches_nobody() -> None:
    manifests = render(BUNDLED)
    policy = named(manifests, "NetworkPolicy", "pdserve-redis")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    assert rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert rule["ports"] == [{"port": "redis", "protocol": "TCP"}]
    egress = named(manifests, "NetworkPolicy", "pdserve-router")["spec"]["egress"]
    assert {"to": [{"podSelector": policy["podSelector"]}], "ports": rule["ports"]} in egress


def test_an_external_server_is_named_by_a_secret_and_reached_where_values_say() -> None:
    manifests = render(MATRIX["external Redis"])
    assert "pdserve-redis" not in {manifest["metadata"]["name"] for manifest in manifests}
    url = env(manifests, "pdserve-router")["PDSERVE_REDIS_URL"]
    assert url == {"secretKeyRef": {"name": "redis", "key": "url"}}
    egress = named(manifests, "NetworkPolicy", "pdserve-router")["spec"]["egress"]
    assert {"ports": [{"port": 6380, "protocol": "TCP"}], "to": [{"ipBlock": {"cidr": "10.2.0.7/32"}}]} in egress
    assert len(config_file(render(BUNDLED, namespace=60 * "n"), "router.yaml")["redis"]["namespace"]) == 64
