"""`pdserve simulate` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdserve.cli.app import app
from pdserve.cli.simulate import parse_engines
from pdserve.core.endpoint import Role
from pdserve.core.errors import ConfigError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = ({"timestamp": 100 * n, "input_length": 600, "output_length": 5, "hash_ids": [0, n + 1]} for n in range(6))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_report_is_loadgen_s_with_what_only_a_simulator_sees(trace: Path) -> None:
    result = CliRunner().invoke(app, ["simulate", str(trace), "--engines", "2p2d"])
    assert result.exit_code == 0
    for expected in ("6 answered", "TTFT", "prefix hits", "imbalance", "prefill-1", "decode-0", "not measured"):
        assert expected in result.stdout


def test_json_is_the_same_for_the_same_seed_and_names_the_settings(trace: Path) -> None:
    outputs = [
        CliRunner().invoke(app, ["simulate", str(trace), "--engines", "4u", "--json", "--seed", "3"]).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    body = json.loads(outputs[0])
    assert body["succeeded"] == 6
    assert body["settings"]["engines"] == {"unified": 4}
    assert body["settings"]["block_size"] == 512
    assert len(body["simulation"]["engines"]) == 4


def test_missed_targets_end_with_exit_code_1(trace: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["simulate", str(trace), "--slo", "ttft=1e-9"]).exit_code == 1
    assert runner.invoke(app, ["simulate", str(trace), "--slo", "ttft=1000"]).exit_code == 0


def test_a_profile_of_one_s_own_decides_the_times(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "slow.yaml"
    profile.write_text(
        "name: slow\nbasis: made up\nkv_tokens: 100000\nmax_model_len: 4096\n"
        "step: {base: 2.0, per_token: 0.0, per_context: 0.0}\n"
        "kv: {num_layers: 1, num_kv_heads: 1, head_dim: 8, dtype: float32}\n"
        "links: {bandwidth: 1.0e+9}\n"
    )
    result = CliRunner().invoke(app, ["simulate", str(trace), "--profile", str(profile), "--json"])
    assert json.loads(result.stdout)["tpot"]["min"] >= 2.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--engines", "2p"], "2p"),
        (["--profile", "nowhere.yaml"], "nowhere.yaml"),
        (["--policy", "dice"], "dice"),
        (["--slo", "speed=1"], "speed=1"),
        (["--kv-tokens", "100"], "512"),
    ],
)
def test_a_wrong_option_is_named(trace: Path, arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["simulate", str(trace), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert named in str(result.exception)


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"timestamp": 0}\n')
    result = CliRunner().invoke(app, ["simulate", str(path)])
    assert isinstance(result.exception, ConfigError)
    assert "line 1" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "engines"),
    [
        ("1p1d", {Role.PREFILL: 1, Role.DECODE: 1}),
        ("3d2p", {Role.DECODE: 3, Role.PREFILL: 2}),
        ("4u", {Role.UNIFIED: 4}),
    ],
)
def test_engines_are_written_as_numbers_and_letters(text: str, engines: dict[Role, int]) -> None:
    assert parse_engines(text) == engines


@pytest.mark.parametrize("text", ["", "p", "2x", "2p2d!", "0p0d", "1p1p1d", "2p", "1d", "-1u"])
def test_engines_that_cannot_serve_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--engines"):
        parse_engines(text)
