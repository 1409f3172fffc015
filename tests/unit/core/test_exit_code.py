"""Exit codes in words."""

import pytest

from pdserve.core.exit_code import manner_of_end


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL"),
        (-35, "was killed by signal 35"),
    ],
)
def test_an_end_is_told_with_the_signal_s_name_where_it_has_one(code: int, words: str) -> None:
    assert manner_of_end(code) == words
