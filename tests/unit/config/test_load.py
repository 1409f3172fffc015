"""The configuration a user ends up with, and what they are told when it cannot be."""

import json
from pathlib import Path

import pytest

from pdserve.config.load import load_config, setting_names
from pdserve.config.schema import Config, Device, from_wire, to_wire
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError

TENANT = f"{{name: search, keys: ['sha256:{'0' * 64}']}}"


def write(directory: Path, text: str) -> Path:
    path = directory / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(directory: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(directory, text))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_without_any_source_one_prefill_and_one_decode_engine_serve_the_demo_model_on_loopback() -> None:
    config = load_config()
    assert (config.model, config.host, config.port, config.grpc_port) == ("demo", "127.0.0.1", 8000, 8001)
    assert {role: pool.engines for role, pool in config.pools.by_role().items()} == {
        Role.PREFILL: 1,
        Role.DECODE: 1,
        Role.UNIFIED: 0,
    }


def test_roles_differ_only_in_limits() -> None:
    prefill, decode = (load_config().pools.by_role()[role].limits(4096) for role in (Role.PREFILL, Role.DECODE))
    assert prefill.max_tokens_per_step > decode.max_tokens_per_step
    assert prefill.max_rows < decode.max_rows
    assert (prefill.accepts_handoff, decode.accepts_handoff) == (False, True)
    assert prefill.max_model_len == decode.max_model_len == 4096


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 1\ngrpc_port: 2\ndevice: cpu\npools: {prefill: {engines: 2, max_rows: 7}}\n")
    config = load_config(
        path, env={"PORT": "3", "GRPC_PORT": "4"}, flags={"port": 5, "pools.prefill.engines": 6, "device": None}
    )
    assert (config.port, config.grpc_port, config.device) == (5, 4, Device.CPU)
    assert (config.pools.prefill.engines, config.pools.prefill.max_rows) == (6, 7)
    assert config.pools.decode.engines == 1


def test_empty_environment_variables_count_as_unset() -> None:
    assert load_config(env={"PORT": "", "GRPC_PORT": ""}).port == 8000


def test_memory_sizes_may_have_units(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "kv: {memory: 3MiB}")).kv.memory == 3 * 1024**2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot: 1", 'prot: unknown key; did you mean "port"?'),
        ("kv: {block_sizes: 1}", 'kv.block_sizes: unknown key; did you mean "block_size"?'),
        ("pools: {prefil: {engines: 1}}", 'pools.prefil: unknown key; did you mean "prefill"?'),
        ("pools: {decode: {engine: 1}}", 'pools.decode.engine: unknown key; did you mean "engines"?'),
        ("times: {heartbeet: 1}", 'times.heartbeet: unknown key; did you mean "heartbeat"?'),
        ("block_size: 16", "block_size: unknown key; it belongs at kv.block_size"),
        ("port: eighty", 'port: must be a valid integer, not "eighty"'),
        ("port: true", "port: must be a valid integer, not true"),
        ("port: 65536", "port: must be less than or equal to 65535, not 65536"),
        ("engine_network: eth0", "engine_network: must be an IPv4 network such as 10.1.0.0/16, or one address, not"),
        ("engine_network: 10.1.0.9/16", "engine_network: must be an IPv4 network such as 10.1.0.0/16, or one address"),
        ("device: gpu", "device: must be 'auto', 'cpu' or 'cuda', not \"gpu\""),
        ("deterministic: maybe", "deterministic: must be 'auto', True or False, not \"maybe\""),
        ("kv: 5", "kv: must be a section with settings of its own, not 5"),
        ("kv: {memory: 12QB}", 'kv.memory: could not interpret byte unit: QB, not "12QB"'),
        (
            "kv: {backends: [nixl, ucx]}",
            "kv.backends[1]: must be 'nixl', 'shared_memory', 'gloo', 'nccl' or 'grpc', not \"ucx\"",
        ),
        ("kv: {backends: []}", "kv.backends: name at least one of nixl, shared_memory, gloo, nccl, grpc"),
        ("kv: {num_blocks: 500, memory: 1MiB}", "kv.memory: give either kv.num_blocks or kv.memory, not both"),
        ("kv: {tiers: {disk: {path: /kv, size: 1GiB}}}", "kv.tiers.host: must be given with kv.tiers.disk"),
        ("kv: {tiers: {host: 1GiB, disk: {path: /kv}}}", "kv.tiers.disk: give both path and size"),
        ("kv: {tiers: {host: 1GiB, disk: {path: kv, size: 1GiB}}}", "kv.tiers.disk.path: kv depends on the folder"),
        (
            "{kv: {tiers: {host: 1GiB}}, pools: {decode: {prefix_caching: false}}}",
            "pools.decode.prefix_caching: must be true with kv.tiers",
        ),
        ("times: {lease: .nan}", "times.lease: must be a finite number, not NaN"),
        ("times: {drain_timeout: 0}", "times.drain_timeout: must be greater than 0"),
        ("times: {fence: 3}", "times.suspect: must be less than times.fence (3): an engine is suspected before"),
        ("grpc_port: 8000", "grpc_port: 8000 is also the HTTP port; choose two different ports"),
        ("host: 0.0.0.0", "host: 0.0.0.0 can be reached from other machines, and no api_keys are set; set api_keys"),
        ("admin_host: '::'", "admin_host: :: can be reached from other machines, and no api_keys are set; set"),
        (f"tenants: [{TENANT}]\nadmin_host: '::'", "admin_host: :: can be reached from other machines"),
        (
            f"tenants: [{TENANT}, {TENANT.replace('search', 'b')}]",
            "tenants[1].keys: sha256:00000000… is a key of search too",
        ),
        ("tenants: [{name: search, keys: [plain-text]}]", "tenants[0].keys[0]: must match pattern"),
        ("tenants: [{name: search, keys: []}]", "tenants[0].keys: without a key nobody is search"),
        (f"tenants: [{TENANT.replace('search', 'default')}]", "tenants[0].name: default are the clients of api_keys"),
        (f"tenants: [{TENANT.replace('}', ', burst: 3}')}]", "tenants[0].burst: goes with requests_per_second only"),
        (f"tenants: [{TENANT.replace('}', ', wieght: 3}')}]", 'tenants[0].wieght: unknown key; did you mean "weight"?'),
        ("slo: {ttft: 0}", "slo.ttft: must be greater than 0"),
        ("admin_port: 8001", "admin_port: 8001 is also the gRPC port; choose two different ports"),
        ("pools: {prefill: {engines: 0}}", "pools: 0 prefill and 1 decode engines cannot serve; set at least 1 of"),
        ("pools: {unified: {engines: 1}}", "pools.unified.engines: unified engines stand alone; set"),
        ("pools: {decode: {accepts_handoff: false}}", "pools.decode.accepts_handoff: must be true while there are"),
        ("pools: {decode: {max_rows: 300}}", "pools.decode.max_rows: 300 rows cannot each have a token in a step"),
        ("ray: {node_ip: 127.0.0.1}", "ray.node_ip: Ray cannot be reached at 127.0.0.1; use 127.0.0.2 or this"),
        ("ray: {auth_token_file: t}", "ray.auth_token_file: a cluster of our own makes its token; give ray.address"),
        ("pools: {prefill: {placement: {gpus: 1.5}}}", "pools.prefill.placement.gpus: 1.5 is neither a part of one"),
        (
            "pools: {decode: {placement: {resources: {near: 1}}}}",
            "pools.decode.placement.resources: near is offered by no node of our own; give ray.address",
        ),
        (
            "worker: inproc\npools: {decode: {tensor_parallel: 2}}",
            "pools.decode.tensor_parallel: each rank needs a process of its own; set worker to auto or process",
        ),
        (
            "device: cuda\npools: {prefill: {tensor_parallel: 2}}",
            "pools.prefill.tensor_parallel: several ranks compute together on cpu only",
        ),
        (
            "pools: {decode: {tensor_parallel: 4, hosts: 3}}",
            "pools.decode.hosts: 4 ranks of tensor_parallel cannot be spread evenly over 3 hosts; choose a divisor",
        ),
        ("kv: {num_blocks: 8}", "kv.num_blocks: 8 blocks of 16 tokens do not hold one request of max_model_len 2048"),
    ],
)
def test_a_wrong_setting_is_named_with_its_path_and_a_remedy(tmp_path: Path, text: str, expected: str) -> None:
    [problem] = problems(tmp_path, text)
    assert problem.startswith(expected)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "prot: 1\nport: -1\nkv: {order: x}\ntimes: {lease: soon, fense: 2}\n")
    assert [line.split(":")[0] for line in found] == ["kv.order", "port", "prot", "times.fense", "times.lease"]


def test_a_problem_names_the_source_that_caused_it() -> None:
    with pytest.raises(ConfigError, match=r"port \(from the variable PORT\): must be a valid integer"):
        load_config(env={"PORT": "http"})
    with pytest.raises(ConfigError, match=r"device \(from the command line\): must be"):
        load_config(flags={"device": "tpu"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nhost: localhost\nport: 2\n", r':3:1: duplicate key "port"; keep one'),
        ("kv:\n  block_size: 8\n  block_size: 16\n", r':3:3: duplicate key "block_size"'),
        ("a: &x 1\nb: *x\n", r":2: aliases \(\*x\) are not supported"),
        ("port: [1\n", r":2:1: "),
        ("- 1\n", r'expected settings such as "port: 8000", found a list'),
        ("1: 2\n", r":1:1: keys must be plain names"),
        ("port: !!python/name:os.system\n", r":1:7: could not determine a constructor"),
        ("a: " + "[" * 1_000_000, r":1: nested deeper than 16 levels"),
    ],
)
def test_unreadable_yaml_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_or_oversized_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml: No such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is larger than"):
        load_config(write(tmp_path, "#" * 1024 * 1024 + "\n"))


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == load_config()


def test_keys_come_from_the_configuration_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# team a\nsecret-one\n\n  secret-two  \n", encoding="utf-8")
    path = write(tmp_path, f"host: 0.0.0.0\napi_keys: [secret-zero]\napi_keys_file: {tmp_path / 'keys'}\n")
    keys = [key.get_secret_value() for key in load_config(path).api_keys]
    assert keys == ["secret-zero", "secret-one", "secret-two"]


def test_a_key_file_without_usable_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("short\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="at least 8 characters"):
        load_config(write(tmp_path, f"api_keys_file: {tmp_path / 'keys'}\n"))


def test_keys_appear_in_no_dump_and_no_error_message(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "api_keys: [very-secret-key]\n"))
    assert "very-secret" not in config.model_dump_json() + repr(config)
    [problem] = problems(tmp_path, "api_keys: [abc]\n")
    assert "abc" not in problem


def test_the_wire_form_restores_the_configuration_with_its_keys(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "api_keys: [very-secret-key]\nkv: {memory: 1MiB}\ntimes: {lease: 7}\n"))
    assert from_wire(to_wire(config)) == config


def test_every_setting_can_be_written_in_a_file(tmp_path: Path) -> None:
    tree = json.loads(Config().model_dump_json(exclude_none=True))
    assert load_config(write(tmp_path, json.dumps(tree))) == load_config()
    assert {"kv.block_size", "times.lease", "pools.decode.engines", "log.level", "port"} <= set(setting_names())


def test_a_redis_url_is_hidden_but_on_the_wire(tmp_path: Path) -> None:
    url = "redis://:very-secret@127.0.0.1:6379"
    config = load_config(write(tmp_path, "only: router"), env={"PDSERVE_REDIS_URL": url})
    assert "very-secret" not in config.model_dump_json()
    restored = from_wire(to_wire(config)).redis.url
    assert restored is not None
    assert restored.get_secret_value() == url
    assert "very-secret" not in str(problems(tmp_path, "redis: {url: [very-secret]}"))


def test_a_router_alone_needs_a_redis(tmp_path: Path) -> None:
    [problem] = problems(tmp_path, "only: router")
    assert problem.startswith("only: ")
    assert "redis.url" in problem
