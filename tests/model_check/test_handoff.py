"""The handoff protocol, model-checked (docs/kv-transfer.md)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model_check.machine import HandoffMachine
from tests.model_check.mutants import MUTANTS


def check(examples: int, steps: int, *, shrink: bool = True, derandomize: bool = False) -> None:
    run_state_machine_as_test(
        HandoffMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_interleaving_breaks_a_promise() -> None:
    check(examples=200, steps=30, derandomize=True)


@pytest.mark.xfail(
    reason="open finding: the second read of a region that arrived damaged starts without another look at its lease, "
    "which may have ended meanwhile; digest and Release answer discard what it brings"
)
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_interleaving_breaks_a_promise_in_many_more() -> None:
    check(examples=5000, steps=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_rule_that_is_taken_out_is_missed(mutant: Callable[[], AbstractContextManager[None]]) -> None:
    with mutant(), pytest.raises((AssertionError, ExceptionGroup)):
        check(examples=3000, steps=40, shrink=False, derandomize=True)
