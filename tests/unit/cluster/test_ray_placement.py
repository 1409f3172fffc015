"""What an engine asks of a Ray cluster, and what happens where Ray is missing."""

import sys

import pytest

from pdserve.cluster.launcher import Resources
from pdserve.cluster.ray_launcher import RayLauncher, bundle_for, fair_share
from pdserve.config.schema import RayConfig
from pdserve.core.errors import ConfigError


@pytest.mark.parametrize(
    ("gpus", "engines", "share"),
    [(0, 2, 0), (1, 1, 1), (1, 2, 0.5), (1, 3, 0.3333), (2, 3, 0.5), (4, 3, 1), (8, 8, 1), (8, 9, 0.5)],
)
def test_gpus_are_shared_evenly_and_no_engine_gets_parts_of_two(gpus: int, engines: int, share: float) -> None:
    assert fair_share(gpus, engines) == share


def test_shares_of_all_engines_fit_on_the_gpus() -> None:
    for gpus in range(1, 9):
        for engines in range(1, 40):
            share = fair_share(gpus, engines)
            per_gpu = int(1 / share + 1e-9)
            assert per_gpu * gpus >= engines
            assert per_gpu * share <= 1


def test_a_bundle_names_only_what_is_wanted() -> None:
    offered = {"CPU": 8.0, "GPU": 1.0}
    assert bundle_for(Resources(cpus=2, gpus=None), offered, engines=2) == {"CPU": 2, "GPU": 0.5}
    assert bundle_for(Resources(cpus=0, gpus=0.25), offered, engines=2) == {"GPU": 0.25}
    assert bundle_for(Resources(custom={"near": 1}), offered, engines=2) == {"CPU": 1, "near": 1}
    assert bundle_for(Resources(cpus=0), offered, engines=2) == {"CPU": 0.001}


def test_without_ray_the_error_names_the_extra_and_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ConfigError, match=r"pdserve\[ray\](.|\n)*--launcher process"):
        RayLauncher(RayConfig(), cpus=1, engines=1)
