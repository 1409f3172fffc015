"""The GPU suite's runner: what one function's tests do leaves those of the others as they are."""

from pathlib import Path

import pytest

from tests.gpu import run

TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_fine(number):
    pass

def test_wrong():
    assert False, "a wrong sum"

def test_dies():
    os._exit(3)

@pytest.mark.parametrize("number", [1, 2])
def test_hangs(number):
    if number == 2:
        time.sleep(600)
"""


@pytest.mark.slow
def test_a_function_that_fails_dies_or_hangs_leaves_the_others_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    outcomes = run.run_all(("-c", "pytest.ini", "--rootdir=."), ".", tmp_path, 25)
    results = {outcome.function.rpartition("::")[2]: outcome for outcome in outcomes}
    assert {name: outcome.result for name, outcome in results.items()} == {
        "test_fine": "passed",
        "test_wrong": "failed",
        "test_dies": "failed",
        "test_hangs": "cut off",
    }
    assert "test_hangs[1] PASSED" in results["test_hangs"].text
    printed = capsys.readouterr().out
    assert "a wrong sum" in printed
    assert "2 passed" in printed


def test_a_suite_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import no_such_module")
    with pytest.raises(RuntimeError, match="no_such_module"):
        run.functions((), ".", tmp_path)
