"""Which processes a configuration asks for, and what each of them learns."""

import json
import socket
import stat
from pathlib import Path

import pytest

from pdserve.cluster.launcher import Resources
from pdserve.config.schema import Config
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError
from pdserve.launch.deployment import desired
from pdserve.launch.fronts import front_socket
from pdserve.launch.ports import DEFAULT_ADMIN_PORT, settle_ports
from pdserve.launch.route import route
from pdserve.launch.welcome import welcome


def config(text: str) -> Config:
    return Config.model_validate_json(text)


def test_engines_are_numbered_within_their_role_and_the_gateway_comes_last() -> None:
    wanted = desired(config('{"pools": {"prefill": {"engines": 2}, "decode": {"engines": 1}}}'), "127.0.0.1:5")
    assert [(item.id, item.role) for item in wanted] == [
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("gateway", None),
    ]


def test_fronts_are_as_many_as_workers_and_meet_the_gateway_at_one_socket() -> None:
    with front_socket(Config()) as none:
        [*_, alone] = desired(Config(), "127.0.0.1:5", socket=none)
        assert (alone.id, alone.launch(1).payload["fronts"]) == ("gateway", "")
    several = Config(workers=3)
    with front_socket(several) as socket:
        assert stat.S_IMODE(Path(socket).parent.stat().st_mode) == 0o700
        _, _, gateway, *fronts = desired(several, "127.0.0.1:5", socket=socket)
        assert [front.id for front in fronts] == ["front-0", "front-1", "front-2"]
        assert [gateway.ends_first, *(front.ends_first for front in fronts)] == [False, True, True, True]
        assert (
            {front.launch(1).payload["gateway"] for front in fronts}
            == {gateway.launch(1).payload["fronts"]}
            == {socket}
        )
    assert not Path(socket).parent.exists()


def test_a_socket_whose_path_is_too_long_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter one"), front_socket(Config(workers=2)):
        pass


def test_each_incarnation_is_told_its_own_epoch() -> None:
    [prefill, *_] = desired(Config(), "127.0.0.1:5")
    first, second = prefill.launch(2**64 - 1), prefill.launch(7)
    assert (first.payload["epoch"], second.payload["epoch"]) == (2**64 - 1, 7)
    assert first.payload["engine_id"] == "prefill-0"
    assert json.loads(json.dumps(first.payload)) == first.payload


def test_engines_take_what_their_pool_says_and_the_gateway_stays_with_the_supervisor() -> None:
    pools = '{"prefill": {"placement": {"cpus": 2, "gpus": 0.5, "resources": {"near": 1}}, "tensor_parallel": 4}}'
    prefill, decode, gateway = desired(config(f'{{"pools": {pools}}}'), "127.0.0.1:5")
    assert prefill.launch(1).resources == Resources(cpus=2, gpus=0.5, custom={"near": 1})
    assert decode.launch(1).resources == Resources(cpus=1, gpus=None)
    assert gateway.launch(1).resources is None


def test_an_engine_takes_a_cpu_for_each_rank_unless_told_otherwise() -> None:
    [prefill, decode, _] = desired(config('{"pools": {"prefill": {"tensor_parallel": 4}}}'), "127.0.0.1:5")
    assert [one.launch(1).resources for one in (prefill, decode)] == [
        Resources(cpus=4, gpus=None),
        Resources(cpus=1, gpus=None),
    ]


def test_engines_on_cpu_take_no_gpu() -> None:
    [prefill, *_] = desired(config('{"device": "cpu"}'), "127.0.0.1:5")
    assert prefill.launch(1).resources == Resources(cpus=1, gpus=0)


def test_only_the_gateway_learns_the_keys() -> None:
    *engines, gateway = desired(config('{"api_keys": ["very-secret-key"]}'), "127.0.0.1:5")
    assert all("secret" not in json.dumps(dict(engine.launch(1).payload)) for engine in engines)
    assert "very-secret-key" in json.dumps(dict(gateway.launch(1).payload))
    assert gateway.launch(1).payload["registry"] == "127.0.0.1:5"


def test_port_zero_becomes_a_free_port_that_stays() -> None:
    settled = settle_ports(Config(port=0, grpc_port=0))
    assert settled.port != settled.grpc_port
    assert min(settled.port, settled.grpc_port) > 0
    assert settle_ports(settled) == settled


def test_a_second_deployment_finds_a_free_admin_port_unless_one_was_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"admin_port: {port} on 127.0.0.1 is in use"):
            settle_ports(Config(port=0, grpc_port=0, admin_port=port))
    try:
        default = socket.create_server(("127.0.0.1", DEFAULT_ADMIN_PORT))
    except OSError:  # somebody has it already, and all is as this test wants it
        default = socket.socket()
    with default:
        settled = settle_ports(Config(port=0, grpc_port=0))
    assert settled.admin_port not in (None, 0, DEFAULT_ADMIN_PORT)


def test_a_taken_port_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"grpc_port: {port} on 127.0.0.1 is in use; stop its owner or choose"):
            settle_ports(Config(port=0, grpc_port=port))


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(ConfigError, match=r"port: cannot listen on 192\.0\.2\.1:0"):
        settle_ports(Config(host="192.0.2.1", port=0))


def test_the_greeting_mentions_a_key_only_when_one_is_needed() -> None:
    open_to_all, keyed = Config(), config('{"api_keys": ["very-secret-key"]}')
    assert "Authorization" not in welcome(open_to_all, "127.0.0.1:8000")
    assert "Authorization: Bearer YOUR_KEY" in welcome(keyed, "127.0.0.1:8000")
    assert "secret" not in welcome(keyed, "127.0.0.1:8000")


def test_only_one_kind_of_process_may_be_wanted() -> None:
    redis = '"redis": {"url": "redis://127.0.0.1"}'
    router = desired(config(f'{{"only": "router", {redis}}}'), "127.0.0.1:5")
    engines = desired(config(f'{{"only": "engines", {redis}, "engine_prefix": "a."}}'), "127.0.0.1:5")
    assert [item.id for item in router] == ["gateway"]
    assert [item.id for item in engines] == ["a.prefill-0", "a.decode-0"]
    assert all("redis://" not in json.dumps(dict(engine.launch(1).payload)) for engine in engines)


def test_a_router_of_route_is_not_started_with_a_redis_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"redis\.url: Redis URL must specify one of"):
        route(config('{"discovery": {"engines": ["127.0.0.1:1"]}, "redis": {"url": "http://127.0.0.1"}}'))


def test_engines_have_their_pools_domains_in_turn() -> None:
    pools = '{"prefill": {"engines": 3, "domain": ["a", "b"]}, "decode": {"engines": 2, "domain": "c"}}'
    told = [item.launch(1).payload.get("domain") for item in desired(config(f'{{"pools": {pools}}}'), "127.0.0.1:5")]
    assert told == ["a", "b", "a", "c", "c", None]
    [prefill, *_] = desired(Config(), "127.0.0.1:5")
    assert prefill.launch(1).payload["domain"] == ""


def test_an_engine_of_several_hosts_has_a_follower_for_each_but_its_own() -> None:
    pools = '{"decode": {"tensor_parallel": 6, "hosts": 3}}'
    [prefill, decode, _] = desired(config(f'{{"pools": {pools}, "threads": 2}}'), "127.0.0.1:5")
    assert prefill.launch(1).followers == ()
    spec = decode.launch(1)
    assert [(each.name, each.payload["number"], each.threads) for each in spec.followers] == [
        ("decode-0/1", 1, 2),
        ("decode-0/2", 2, 2),
    ]
    assert spec.resources == Resources(cpus=2, gpus=None)
