import pytest

from pdserve.router.wait_error import WaitError


def test_long_waits_tell_how_wrong_predictions_are() -> None:
    error = WaitError(10.0)
    for _ in range(60):
        error.seen(predicted=4.0, actual=8.0)
    assert error.ratio == pytest.approx(2.0, rel=0.1)
    for _ in range(60):
        error.seen(predicted=4.0, actual=4.0)
    assert error.ratio == pytest.approx(1.0, abs=0.01)


def test_short_ones_hardly_do() -> None:
    """A first token foreseen after 50 ms that takes 400 does not make ten seconds of two."""
    error = WaitError(10.0)
    for _ in range(60):
        error.seen(predicted=0.05, actual=0.4)
    assert 1.0 < error.ratio < 2.0


def test_nobody_is_let_in_on_the_word_of_the_lucky() -> None:
    error = WaitError(10.0)
    error.seen(predicted=8.0, actual=1.0)
    assert error.ratio == 1.0
