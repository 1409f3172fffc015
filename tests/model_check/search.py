"""Finds an interleaving in which a mutant breaks a promise, and cuts it down to the steps that matter.

    python -m tests.model_check.search [MUTANT …]

prints functions for scenarios.py. Needed when a change of the protocol moves its messages in time, so that a scenario
no longer reaches the moment it was made for.
"""

import ast
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model_check.machine import HandoffMachine
from tests.model_check.mutants import MUTANTS
from tests.model_check.network import Fault

Mutant = Callable[[], AbstractContextManager[None]]
Step = tuple[str, dict[str, object]]
"""Name of a rule and what it is called with."""

_BREATH: Step = ("time_passes", {"seconds": 0.03})
_FAULTS = {f"<Fault.{fault.name}: '{fault.value}'>": f"Fault.{fault.name}" for fault in Fault}


def find(mutant: Mutant, examples: int = 30_000) -> list[Step] | None:
    """Some interleaving that betrays the mutant."""
    try:
        with mutant():
            run_state_machine_as_test(
                HandoffMachine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=40,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    report_multiple_bugs=False,
                    suppress_health_check=list(HealthCheck),
                ),
            )
    except (AssertionError, ExceptionGroup) as failure:
        return _steps("\n".join(failure.__notes__))
    return None


def betrays(steps: list[Step], mutant: Mutant) -> bool:
    """Whether the steps break a promise with the mutant and none without."""
    with mutant():
        if _holds(steps):
            return False
    return _holds(steps)


def shortened(steps: list[Step], mutant: Mutant) -> list[Step]:
    """Without every step that is not needed, single ones last."""
    size = len(steps) // 2
    while size:
        position = 1  # the first one begins
        while position < len(steps):
            shorter = steps[:position] + steps[position + size :]
            if betrays(shorter, mutant):
                steps = shorter
            else:
                position += size
        size //= 2
    return steps


def simplified(steps: list[Step], mutant: Mutant) -> list[Step]:
    """With time in place of whatever only took time, and first ones in place of others."""
    for position, (name, arguments) in enumerate(steps[1:], start=1):
        for simpler in (_BREATH, (name, arguments | {"index": 0})):
            if simpler != (name, arguments) and (simpler is _BREATH or "index" in arguments):
                changed = [*steps[:position], simpler, *steps[position + 1 :]]
                if betrays(changed, mutant):
                    steps = changed
                    break
    return steps


def _holds(steps: list[Step]) -> bool:
    machine = HandoffMachine()
    try:
        try:
            for name, arguments in steps:
                getattr(machine, name)(**arguments)
                machine.promises_are_kept()
        finally:
            machine.teardown()
    except (AssertionError, ExceptionGroup, ZeroDivisionError, IndexError):
        return False
    return True


def _steps(report: str) -> list[Step]:
    """The steps hypothesis reports, as in state.freeze(engine_id='p0')."""
    for shown, written in _FAULTS.items():
        report = report.replace(shown, written)
    calls = [ast.parse(line).body[0].value for line in report.splitlines() if line.startswith("state.")]  # type: ignore[attr-defined]
    steps = [(call.func.attr, {word.arg: _value(word.value) for word in call.keywords}) for call in calls]
    return [step for step in steps if step[0] not in ("promises_are_kept", "teardown")]


def _value(node: ast.expr) -> object:
    return Fault[node.attr] if isinstance(node, ast.Attribute) else ast.literal_eval(node)


def _written(value: object) -> str:
    return f"Fault.{value.name}" if isinstance(value, Fault) else repr(value)


def _function(name: str, steps: list[Step]) -> str:
    lines = [f"def {name}(happens: HandoffMachine) -> None:"]
    for rule, arguments in steps:
        words = ", ".join(f"{key}={_written(value)}" for key, value in arguments.items())
        lines.append(f"    happens.{rule}({words})")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    for mutant in MUTANTS:
        if names and mutant.__name__ not in names:
            continue
        steps = find(mutant)
        if steps is None or not betrays(steps, mutant):
            print(f"# {mutant.__name__}: nothing found", flush=True)
            continue
        print(_function(mutant.__name__, simplified(shortened(steps, mutant), mutant)), end="\n\n\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
