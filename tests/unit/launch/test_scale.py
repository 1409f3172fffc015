"""What `pdserve scale` is refused with before it does anything, and whom gateways tell of their load."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from pdserve.cluster.k8s.target import Target
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.config.load import load_config
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError
from pdserve.launch.gateway import scaler_address
from pdserve.launch.kubernetes import open_kubernetes
from pdserve.launch.scale import check
from pdserve.launch.serve import supervise

PREFILL, DECODE = "scaler.kubernetes.prefill", "scaler.kubernetes.decode"
POOLS = "pools: {prefill: {max: 4}, decode: {max: 4}}\n"


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "policies.yaml"
    path.write_text(text)
    return str(path)


def test_it_knows_what_holds_each_pool(tmp_path: Path) -> None:
    named = {PREFILL: "LeaderWorkerSet/p", DECODE: "RayCluster/ray/decode", "policies": written(tmp_path, POOLS)}
    assert check(load_config(flags=named)) == {
        Role.PREFILL: Target("LeaderWorkerSet", "p"),
        Role.DECODE: Target("RayCluster", "ray", "decode"),
    }


@pytest.mark.parametrize(
    ("policy", "targets", "words"),
    [
        (None, {}, "policies: names no file"),
        (POOLS, {PREFILL: "StatefulSet/p"}, "scaler.kubernetes.decode: must say what holds the pods"),
        (POOLS + "flip: {enabled: true}\n", {}, "policies.yaml: flip.enabled: an engine in a pod of its own"),
        ("pools: {unified: {max: 4}}\n", {}, "pools.unified: pods are of prefill or decode"),
    ],
)
def test_what_it_cannot_scale_is_said_at_the_start(
    tmp_path: Path, policy: str | None, targets: dict[str, str], words: str
) -> None:
    given = {"policies": written(tmp_path, policy)} if policy else {}
    with pytest.raises(ConfigError, match=words):
        check(load_config(flags={**given, **targets}))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        (PREFILL, "p", "must be StatefulSet/NAME, Deployment/NAME, LeaderWorkerSet/NAME or RayCluster/NAME/GROUP"),
        (PREFILL, "RayCluster/ray", "must be StatefulSet/NAME"),
        (PREFILL, "DaemonSet/p", "must be StatefulSet/NAME"),
        (PREFILL, "LeaderWorkerSet/p/0", "must be StatefulSet/NAME"),
        ("scaler.address", "scaler", "scaler.address"),
        ("times.kubernetes_answer", 9.0, "must be at most a third of times.scaler_lease"),
        ("times.scaler_lease", 15.5, "no whole number of seconds"),
    ],
)
def test_mistaken_settings_are_refused(setting: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(flags={setting: value})


@pytest.mark.parametrize("target", ["StatefulSet/p", "Deployment/p", "RayCluster/ray/prefill"])
def test_pods_that_count_as_one_engine_each_hold_no_engine_of_several_hosts(target: str) -> None:
    spanning = {"pools.prefill.tensor_parallel": 4, "pools.prefill.hosts": 2, DECODE: target}
    load_config(flags=spanning)
    load_config(flags={**spanning, PREFILL: "LeaderWorkerSet/p"})
    with pytest.raises(ConfigError, match=f"{PREFILL}: {target} has a pod for each engine.*name a LeaderWorkerSet"):
        load_config(flags={**spanning, PREFILL: target})


def test_gateways_tell_the_scaler_they_are_given_or_their_supervisors() -> None:
    assert scaler_address(load_config(), "registry:1") == ""
    assert scaler_address(load_config(flags={"policies": "p.yaml"}), "registry:1") == "registry:1"
    apart = load_config(flags={"policies": "p.yaml", "scaler.address": "scaler.ns.svc:8103"})
    assert scaler_address(apart, "registry:1") == "scaler.ns.svc:8103"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scaler.address": "scaler.ns.svc:8103"}, "scaler.address: is for gateways of `pdserve route`"),
        ({PREFILL: "Deployment/p"}, "a Deployment lets go of any Ray node, also of one with an engine"),
    ],
)
async def test_serve_refuses_what_is_not_for_it(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    config = load_config(flags={"policies": written(tmp_path, POOLS), "launcher": "process", **settings})
    with pytest.raises(ConfigError, match=words):
        await supervise(config, ProcessLauncher())


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "pdserve.cluster.k8s.client":
            raise ModuleNotFoundError("No module named 'kubernetes'", name="kubernetes")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with (
        pytest.raises(ConfigError, match=r"needs kubernetes: pip install 'pdserve\[k8s\]'"),
        open_kubernetes(load_config()),
    ):
        pass
