"""Token histories under random starts, additions and drops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.worker.seen_tokens import SeenTokens

VOCAB = 20
tokens = st.integers(0, VOCAB - 1)
actions = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 15), st.lists(tokens)),
    st.tuples(st.just("add"), st.integers(0, 15), tokens),
    st.tuples(st.just("drop"), st.integers(0, 15), st.none()),
)


@given(st.lists(actions, max_size=60))
def test_histories_equal_those_of_a_dictionary_of_sets(script: list[tuple[str, int, list[int] | int | None]]) -> None:
    seen, model = SeenTokens(VOCAB, torch.device("cpu")), dict[int, set[int]]()
    for action, sequence, value in script:
        if isinstance(value, list):
            seen.start(sequence, value)
            model[sequence] = set(value)
        elif isinstance(value, int) and sequence in model:
            seen.add(sequence, value)
            model[sequence].add(value)
        elif action == "drop":
            seen.drop(sequence)
            model.pop(sequence, None)
    assert all((sequence in seen) == (sequence in model) for sequence in range(16))
    flags = seen.of(list(model))
    assert [set(row.nonzero().flatten().tolist()) for row in flags] == list(model.values())
