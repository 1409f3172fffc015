"""The step-time model is learned from what engines report of their steps."""

from random import Random

import pytest

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import StepTally
from pdserve.router.calibration import StepCalibrator, scaled

TRUTHS = {
    "gpu": StepModel(base=4e-3, per_token=3e-5, per_context=2e-8),
    "cpu": StepModel(base=9e-3, per_token=8e-4, per_context=5e-7),
    "no context term": StepModel(base=2e-3, per_token=1e-4, per_context=0.0),
}


class Machine:
    """Takes steps of all sizes at a true cost, with noise, and tallies them as an engine does."""

    def __init__(self, truth: StepModel, seed: int = 0) -> None:
        self.truth = truth
        self.random = Random(seed)
        self.tallies = [StepTally() for _ in range(11)]

    def step(self, tokens: int, context: int, noise: float = 0.1) -> None:
        seconds = self.truth.seconds(tokens, context) * self.random.uniform(1 - noise, 1 + noise)
        old = self.tallies[tokens.bit_length()]
        self.tallies[tokens.bit_length()] = StepTally(
            steps=old.steps + 1,
            tokens=old.tokens + tokens,
            context=old.context + context,
            seconds=old.seconds + seconds,
        )

    def heartbeat(self, calibrator: StepCalibrator, steps: int = 40) -> None:
        for _ in range(steps):
            self.step(self.random.choice((1, 4, 16, 64, 300, 512)), self.random.randrange(100_000))
        calibrator.update(self.tallies)


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_a_noisy_machine_is_recovered(truth: StepModel) -> None:
    machine, calibrator = Machine(truth), StepCalibrator()
    for _ in range(60):
        machine.heartbeat(calibrator)
    model = calibrator.model
    assert model.base == pytest.approx(truth.base, rel=0.1)
    assert model.per_token == pytest.approx(truth.per_token, rel=0.1)
    assert model.per_context == pytest.approx(truth.per_context, rel=0.25, abs=1e-8)


def test_no_term_is_ever_negative() -> None:
    machine, calibrator = Machine(StepModel(base=1e-4, per_token=1e-4, per_context=0.0), seed=3), StepCalibrator()
    for _ in range(20):
        for _ in range(5):
            machine.step(machine.random.randrange(1, 100), machine.random.randrange(1000), noise=0.9)
        calibrator.update(machine.tallies)
        model = calibrator.model
        assert min(model.base, model.per_token, model.per_context) >= 0
        assert model.seconds(1, 1) > 0


def test_a_term_a_peer_missed_is_found_by_its_heirs() -> None:
    """Engines that die often learn little each, and each starts from what another had learned."""
    model = StepModel(base=0.0, per_token=0.0, per_context=1e-6)
    for _ in range(3):
        machine, calibrator = Machine(TRUTHS["cpu"]), StepCalibrator(model)
        for _ in range(20):
            machine.heartbeat(calibrator)
        model = calibrator.model
    assert model.seconds(256, 5_000) == pytest.approx(TRUTHS["cpu"].seconds(256, 5_000), rel=0.2)
    assert model.seconds(1, 5_000) == pytest.approx(TRUTHS["cpu"].seconds(1, 5_000), rel=0.2)


def test_context_alone_never_explains_a_step() -> None:
    machine, calibrator = Machine(StepModel(base=0.0, per_token=0.0, per_context=1e-5), seed=1), StepCalibrator()
    for generation in range(200):
        for _ in range(20):
            machine.step(1, machine.random.randrange(500, 5_000), noise=0.5)
        calibrator.update(machine.tallies)
        assert calibrator.model.base + calibrator.model.per_token > 0
        if generation % 10 == 0:
            machine, calibrator = Machine(machine.truth, seed=generation), StepCalibrator(calibrator.model)


def test_a_machine_that_slows_down_is_followed() -> None:
    machine, calibrator = Machine(TRUTHS["gpu"]), StepCalibrator()
    for _ in range(100):
        machine.heartbeat(calibrator, 10)
    machine.truth = StepModel(base=8e-3, per_token=6e-5, per_context=4e-8)
    for _ in range(200):
        machine.heartbeat(calibrator, 10)
    assert calibrator.model.seconds(256, 50_000) == pytest.approx(machine.truth.seconds(256, 50_000), rel=0.1)


def test_one_kind_of_step_leaves_the_rest_to_the_prior_in_proportion() -> None:
    machine, calibrator = Machine(StepModel(base=0.05, per_token=4e-4, per_context=1e-7)), StepCalibrator()
    for _ in range(50):
        machine.step(1, 100)
    calibrator.update(machine.tallies)
    prior = StepModel()
    assert calibrator.model.seconds(1, 100) == pytest.approx(0.0504, rel=0.05)
    assert calibrator.model.per_token == pytest.approx(prior.per_token * 10, rel=0.2)


def test_the_same_report_counts_once_and_before_any_a_peers_model_holds() -> None:
    peer = StepModel(base=1.0, per_token=2.0, per_context=3.0)
    calibrator = StepCalibrator(peer)
    assert (calibrator.model, calibrator.calibrated) == (peer, False)
    machine = Machine(TRUTHS["gpu"])
    machine.heartbeat(calibrator)
    learned = calibrator.model
    calibrator.update(machine.tallies)
    assert calibrator.calibrated
    assert calibrator.model is learned


def test_a_busy_machine_does_not_look_idle_because_some_steps_were_fast() -> None:
    """Steps take 1 or 9 times what they would alone, second by second: on average 5 times."""
    machine, calibrator = Machine(TRUTHS["cpu"], seed=4), StepCalibrator()
    for second in range(60):
        machine.truth = scaled(TRUTHS["cpu"], 1.0 if second % 2 else 9.0)
        machine.heartbeat(calibrator)
    for tokens in (1, 64, 512):
        alone = TRUTHS["cpu"].seconds(tokens, 50_000)
        assert calibrator.model.seconds(tokens, 50_000) == pytest.approx(5 * alone, rel=0.25)
