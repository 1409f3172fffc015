"""`pdserve policy` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdserve.cli.app import app
from pdserve.cli.policy import render_explanation
from pdserve.core.errors import PdserveError

POLICY = """\
interval: 1
window: 5
slo: {ttft: {seconds: 0.4}, tpot: {seconds: 0.1}}
pools:
  prefill: {max: 3, warm_up: 2, forecast: {bin: 2}, down: {cooldown: 0, window: 5}}
  decode: {max: 3, warm_up: 2, forecast: {bin: 2}, down: {cooldown: 0, window: 5}}
"""


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICY)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Quiet, then more than one prefill engine can do, then quiet."""
    path = tmp_path / "trace.jsonl"
    times = [*range(0, 4000, 1000), *range(4000, 9000, 70), *range(9000, 25000, 1000)]
    rows = ({"timestamp": at, "input_length": 600, "output_length": 8, "hash_ids": [at, at + 1]} for at in times)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_check_says_that_a_policy_is_valid_or_all_that_is_wrong(policies: Path) -> None:
    assert CliRunner().invoke(app, ["policy", "check", str(policies)]).stdout == "the policy is valid\n"
    policies.write_text(POLICY.replace("max: 3", "max: none"))
    result = CliRunner().invoke(app, ["policy", "check", str(policies)])
    assert "line 5: pools.prefill.max" in str(result.exception)
    assert "line 6: pools.decode.max" in str(result.exception)


def test_replay_shows_engines_over_time_what_they_cost_and_which_rules_fired(policies: Path, trace: Path) -> None:
    arguments = ["policy", "replay", str(policies), str(trace), "--profile", "demo-cpu", "--engines", "1p1d"]
    result = CliRunner().invoke(app, arguments)
    for expected in ("PREFILL READY/WANTED", "engine-seconds: ", "rules that fired: ", "prefill from 1 to", "TTFT"):
        assert expected in result.stdout
    assert "1/1" in result.stdout


def test_replay_is_the_same_for_the_same_seed(policies: Path, trace: Path) -> None:
    arguments = ["policy", "replay", str(policies), str(trace), "--profile", "demo-cpu", "--json", "--seed", "3"]
    outputs = [CliRunner().invoke(app, arguments).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]
    scaling = json.loads(outputs[0])["scaling"]
    assert max(moment["wanted"] for moment in scaling["timeline"] if moment["role"] == "prefill") > 1
    assert scaling["timeline"][-1]["wanted"] == 1
    assert scaling["decisions"][0]["inputs"]["pressure"] > 0
    assert set(scaling["engine_seconds"]) == {"prefill", "decode"}


def test_replay_refuses_engines_the_policy_is_not_for(policies: Path, trace: Path) -> None:
    result = CliRunner().invoke(app, ["policy", "replay", str(policies), str(trace), "--engines", "2u"])
    assert "the policy is one for decode and prefill" in str(result.exception)


def test_explain_shows_pools_and_decisions_with_what_else_there_was() -> None:
    told = {
        "policy": "policies.yaml",
        "refusal": "",
        "blind": "",
        "failures": {"denied": 3},
        "latest_failure": "scaling StatefulSet/p is not allowed",
        "dry_run": True,
        "pools": [
            {
                "role": "prefill", "wanted": 2, "ready": 1, "warming": 1, "need": 1.5, "desired": 3,
                "pressure": 1.2, "rule": "backlog", "held": "cooldown",
            }
        ],
        "decisions": [
            {
                "at": 1.8e9, "speed": "scale", "what": "prefill from 1 to 2 engines", "rule": "backlog",
                "reason": "2 engines are right by backlog", "dry_run": True, "inputs": {"pressure": 1.5},
                "alternatives": [{"speed": "flip", "what": "decode engines to prefill", "why": "none to spare"}],
            }
        ],
    }  # fmt: skip
    text = render_explanation(json.dumps(told).encode(), latest=5)
    assert "cannot be seen" not in text
    assert "cannot be seen" in render_explanation(json.dumps({**told, "blind": "no answer"}).encode(), latest=5)
    for expected in ("p is not allowed", "3 × denied"):
        assert expected in text
    for expected in ("dry run", "cooldown", "would: prefill from 1 to 2", "pressure 1.5", "flip: decode engines"):
        assert expected in text
    assert "prefill from 1 to 2" not in render_explanation(json.dumps({**told, "decisions": []}).encode(), latest=5)
    with pytest.raises(PdserveError, match="not about scaling"):
        render_explanation(b"[]", latest=5)
