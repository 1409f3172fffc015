"""Every section of the GPU suite gets to its end with tiny shapes, here interpreted; and what a section measured before
it was ended stays in the JSON."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if not find_spec("triton"):
    pytest.skip("needs Triton, which CUDA builds of torch bring along", allow_module_level=True)

from benchmarks.gpu import ops, run

NAMES = [name for section in run.SECTIONS for name in section.names]
QUICK = "steps"


def results(name: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    run.measure(name, told.append, dry=True, seconds=250)
    json.dumps(told)
    return told


def test_steps_are_measured() -> None:
    told = results(QUICK)
    measured = [entry for entry in told if "forward_ms" in entry]
    assert [entry["rows"] for entry in measured] == [1, 2]
    assert all(0 <= entry["idle_share"] < 1 and entry["forward_ms"] > 0 for entry in measured)
    assert told[-1]["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != QUICK])
def test_every_section_gets_to_its_end(name: str) -> None:
    told = results(name)
    assert told
    assert not [entry for entry in told if "error" in entry]
    if name == "peers":
        (contest,) = told
        assert not contest["errors"]
        assert set(contest["tokens_per_second"]) == {"pdserve", "generate", "generate_batch"}


def sections_of(script: str, monkeypatch: pytest.MonkeyPatch, *sections: run.Section) -> None:
    """Processes that run a script of two arguments, name and file, instead of a section."""
    monkeypatch.setattr(run, "SECTIONS", sections)
    monkeypatch.setattr(run, "_GRACE", 0.0)
    monkeypatch.setattr(run, "_command", lambda name, lines, seconds, dry: [sys.executable, "-c", script, name, lines])


@pytest.mark.slow
def test_what_was_told_stays_when_a_section_fails_or_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import sys, time
name, lines = sys.argv[1:]
with open(lines, "w") as file:
    file.write('{"a": 1}\\n{"b"')
if name == "fails":
    sys.exit(3)
time.sleep(600)
"""
    sections_of(script, monkeypatch, run.Section(("hangs",), 12), run.Section(("fails",), 60))
    report = run.run_all(tmp_path / "gpu.json", "", 80, dry=True)
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    assert report["sections"]["hangs"]["outcome"] == "cut off by its budget"
    assert report["sections"]["fails"]["outcome"] == "failed with status 3"
    assert [section["results"] for section in report["sections"].values()] == [[{"a": 1}]] * 2


def test_sections_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    report = run.run_all(tmp_path / "gpu.json", "", 1, dry=True)
    assert {section["outcome"] for section in report["sections"].values()} == {"left out: no time"}
    assert list(report["sections"]) == NAMES


def test_a_case_that_fails_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr("benchmarks.gpu.attention._peer_seconds", broken)
    monkeypatch.setattr("benchmarks.gpu.ops.measured", broken)
    monkeypatch.setattr("benchmarks.gpu.sections._op_cases", lambda *_: [ops.norm_case(16, 2)])
    uneven, prompt, norm = results("kernels")[1:]
    assert uneven.get("microseconds", 0) > 0, uneven
    assert prompt["torch_over_kernel"] is None
    assert norm["error"] == "OutOfMemoryError: too much"


def test_facts_are_told_where_neither_git_nor_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert (run.facts()["commit"], run.facts()["gpu"]) == ("none", "none")


def test_interpreted_figures_are_not_taken_for_a_gpus() -> None:
    assert run.facts()["gpu"] == "none" or torch.cuda.is_available()
