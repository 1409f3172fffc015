"""The handoff protocol, model-checked (docs/kv-transfer.md)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model_check.machine import HandoffMachine
from tests.model_check.mutants import MUTANTS
from tests.model_check.scenarios import SCENARIOS, Scenario


def check(examples: int, steps: int, *, derandomize: bool = False) -> None:
    run_state_machine_as_test(
        HandoffMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


def play(scenario: Scenario) -> None:
    machine = HandoffMachine()
    try:
        scenario(machine)
        machine.promises_are_kept()
    finally:
        machine.teardown()


def test_no_interleaving_breaks_a_promise() -> None:
    check(examples=200, steps=30, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_interleaving_breaks_a_promise_in_many_more() -> None:
    check(examples=5000, steps=40)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_rule_that_is_taken_out_is_missed(mutant: Callable[[], AbstractContextManager[None]]) -> None:
    scenario = SCENARIOS[mutant.__name__]
    play(scenario)
    with mutant(), pytest.raises((AssertionError, ExceptionGroup)):
        play(scenario)
