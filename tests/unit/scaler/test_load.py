"""What an operator is told of a policy that cannot be: line, field, reason."""

from pathlib import Path
from typing import Any

import pytest

from pdserve.core.errors import ConfigError
from pdserve.scaler.load import _section, load_policy
from pdserve.scaler.policy import Policy

GOOD = """\
interval: 5
pools:
  prefill:
    min: 1
    max: 8
  decode:
    min: 1
    max: 8
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "policies.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_short_policy_has_defaults_for_everything_else(tmp_path: Path) -> None:
    policy = load_policy(write(tmp_path, GOOD))
    assert policy.pools.prefill
    assert (policy.interval, policy.pools.prefill.max, policy.pools.unified) == (5.0, 8, None)
    assert policy.pools.prefill.forecast.kind == "holt_winters"
    assert not policy.dry_run


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("interval: 5", "intervall: 5", 'line 1: intervall: unknown key; did you mean "interval"?'),
        ("interval: 5", "interval: fast", 'line 1: interval: must be a valid number, not "fast"'),
        ("interval: 5", "interval: 0", "line 1: interval: must be greater than or equal to 0.5, not 0"),
        ("interval: 5", "interval: .inf", "line 1: interval: must be a finite number"),
        ("interval: 5", "interval: 5\nwindow: 2", "line 2: window: must not be shorter than interval (5)"),
        ("interval: 5", "dry_run: maybe", 'line 1: dry_run: must be true or false, not "maybe"'),
        ("interval: 5", "timezone: Mars/Olympus", "line 1: timezone: 'Mars/Olympus' is no time zone"),
        ("interval: 5", "total: 1", "line 1: total: must not be less than what the pools have at least, together 2"),
        ("interval: 5", "cost_ceiling: 1.5", "line 1: cost_ceiling: must not be less than what min of the pools costs"),
        ("interval: 5", "slo: {ttft: {seconds: -1}}", "line 1: slo.ttft.seconds: must be greater than 0, not -1"),
        ("interval: 5", "slo: {ttft: 2}", "line 1: slo.ttft: must be a section with settings of its own, not 2"),
        ("interval: 5", "slo: {tpot: {percentile: 95}}", "line 1: slo.tpot.seconds: must be given"),
        ("interval: 5", "slo: {tpot: {seconds: 1, percentile: 100}}", "slo.tpot.percentile: must be less than 100"),
        ("interval: 5", "bypass: {max_tokens: 0}", "line 1: bypass.max_tokens: must be greater than or equal to 1"),
        ("    min: 1\n    max: 8\n  decode", "    min: 1\n  decode", "line 3: pools.prefill.max: must be given"),
        (
            "    min: 1\n    max: 8\n  decode",
            "    min: 9\n    max: 8\n  decode",
            "line 5: pools.prefill.max: must not be",
        ),
        (
            "    min: 1\n    max: 8\n  decode",
            "    min: 0\n    max: 8\n  decode",
            "line 2: pools: prefill and decode need",
        ),
        ("    max: 8\n  decode", "    max: 8.5\n  decode", "line 5: pools.prefill.max: must be a valid integer"),
        ("    max: 8\n  decode", "    max: 8\n    max: 9\n  decode", 'duplicate key "max"'),
        (
            "    max: 8\n  decode",
            "    max: 8\n    targets: {kv_occupancy: 80}\n  decode",
            "line 6: pools.prefill.targets",
        ),
        ("    max: 8\n  decode", "    max: 8\n    up: {step: 0}\n  decode", "line 6: pools.prefill.up.step: must be"),
        (
            "    max: 8\n  decode",
            "    max: 8\n    reactive: {dead_band: [1.0, 0.5]}\n  decode",
            "line 6: pools.prefill.reactive.dead_band: must be [low, high] with low below high",
        ),
        (
            "    max: 8\n  decode",
            "    max: 8\n    forecast: {kind: prophet}\n  decode",
            "line 6: pools.prefill.forecast.kind: must be 'none', 'last', 'ewma' or 'holt_winters'",
        ),
        (
            "    max: 8\n  decode",
            "    max: 8\n    forecast: {bin: 1}\n  decode",
            "line 6: pools.prefill.forecast.bin: must not be shorter than interval (5)",
        ),
        (
            "    max: 8\n  decode",
            '    max: 8\n    schedules:\n    - {start: "08:00", end: "25:00", min: 2}\n  decode',
            "line 7: pools.prefill.schedules[0].end: must match pattern",
        ),
        (
            "    max: 8\n  decode",
            '    max: 8\n    schedules:\n    - {start: "08:00", end: "20:00"}\n  decode',
            "line 7: pools.prefill.schedules[0]: changes nothing; give min, max or both",
        ),
        (
            "    max: 8\n  decode",
            '    max: 8\n    schedules:\n    - {start: "08:00", end: "20:00", days: [someday], min: 2}\n  decode',
            "line 7: pools.prefill.schedules[0].days[0]: must be 'mon'",
        ),
        ("  decode", "  encode", 'line 6: pools.encode: unknown key; did you mean "decode"?'),
        ("pools:", "pools: &all", "pools"),
        ("pools:\n", "pools:\n  unified: {max: 2}\n", "line 3: pools.unified: unified engines stand alone"),
    ],
)
def test_a_mistake_is_refused_with_its_line_its_field_and_the_reason(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in GOOD
    if new == "pools: &all":
        new, said = "pools: *all", "policies.yaml:2"
    with pytest.raises(ConfigError) as caught:
        load_policy(write(tmp_path, GOOD.replace(old, new, 1)))
    assert said in str(caught.value)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("interval: 5", "interval: 0").replace("    max: 8\n  decode", "    most: 8\n  decode")
    with pytest.raises(ConfigError) as caught:
        load_policy(write(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert "3 problems in the policy" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 1", "line 3", "line 5"]


def test_an_empty_file_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: pools: must be given"):
        load_policy(write(tmp_path, ""))


def test_every_field_is_described_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "autoscaling.md").read_text(encoding="utf-8")
    missing = [name for name in _fields(Policy) if f"`{name}`" not in text]
    assert not missing


def _fields(section: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in section.model_fields.items():
        if prefix == "" and name == "pools":
            inner = _section(_section(info.annotation).model_fields["prefill"].annotation)
            found += _fields(inner, "pools.POOL.")
        elif inner := _section(info.annotation):
            found += _fields(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found
