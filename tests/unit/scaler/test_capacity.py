"""Numbers of engines against queueing theory's own numbers, and what more load may never do."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.cluster import StepModel
from pdserve.scaler.capacity import (
    MOST_ENGINES,
    PromptLoad,
    TokenLoad,
    engines_for_prompts,
    engines_for_tokens,
    erlang_c,
    percentile_of,
    wait_percentile,
)

PROMPTS = PromptLoad(rate=10.0, mean=0.5, deviation=0.5, own=1.0)
TOKENS = TokenLoad(
    rate=4.0,
    output=200.0,
    context=4000.0,
    row_seconds=6.0,
    kv_token_seconds=24_000.0,
    step=StepModel(base=0.02, per_token=1e-4, per_context=1e-7),
    kv_tokens=200_000,
    max_rows=256,
)


def test_the_share_that_waits_is_erlang_s() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)  # M/M/1: the utilisation
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)


def test_one_server_s_wait_is_exponential() -> None:
    load = PromptLoad(rate=1.0, mean=0.5, deviation=0.5, own=0.0)
    # P(W > t) = rho · exp(-(1 - rho) t / mean)
    assert wait_percentile(load, 1, 95.0) == pytest.approx(2.302585, abs=1e-4)
    assert wait_percentile(replace(load, deviation=0.0), 1, 95.0) == pytest.approx(2.302585 / 2, abs=1e-4)


def test_the_wait_counts_an_engine_that_can_just_keep_up_is_not_enough() -> None:
    just_enough = 5.01
    assert wait_percentile(PROMPTS, 5, 95.0) == float("inf")
    assert engines_for_prompts(PROMPTS, 2.0, 95.0) > just_enough
    assert engines_for_prompts(PROMPTS, 1.2, 95.0) > engines_for_prompts(PROMPTS, 10.0, 95.0) >= just_enough


def test_a_backlog_wants_engines_beyond_the_load_s() -> None:
    behind = replace(PROMPTS, backlog=300.0, recover=30.0)
    assert engines_for_prompts(behind, 2.0, 95.0) == pytest.approx(15.0)


def test_prompts_longer_than_the_target_do_not_want_engines_without_end() -> None:
    assert engines_for_prompts(replace(PROMPTS, own=50.0), 2.0, 95.0) < 20


def test_what_binds_tokens_may_be_time_or_memory() -> None:
    roomy = replace(TOKENS, kv_tokens=10**9)
    by_time = engines_for_tokens(roomy, 0.025, 0.8)
    assert by_time == pytest.approx(4.0 * 200.0 * 0.025 * 5e-4 / 0.005, rel=1e-3)
    assert engines_for_tokens(replace(TOKENS, kv_tokens=50_000), 0.1, 0.8) > engines_for_tokens(TOKENS, 0.1, 0.8)
    assert engines_for_tokens(replace(TOKENS, kv_token_seconds=240_000.0), 0.1, 0.8) > engines_for_tokens(
        TOKENS, 0.1, 0.8
    )


def test_a_target_below_one_empty_step_cannot_be_met() -> None:
    assert engines_for_tokens(TOKENS, 0.02, 0.8) == MOST_ENGINES


@given(
    st.floats(min_value=0.01, max_value=50),
    st.floats(min_value=0.01, max_value=5),
    st.floats(min_value=0, max_value=5),
    st.floats(min_value=0.2, max_value=30),
)
def test_more_prompts_or_a_tighter_target_never_want_fewer_engines(
    rate: float, mean: float, deviation: float, target: float
) -> None:
    load = PromptLoad(rate=rate, mean=mean, deviation=deviation, own=percentile_of(mean, deviation, 95.0))
    engines = engines_for_prompts(load, target, 95.0)
    assert engines >= load.offered or engines == MOST_ENGINES
    assert engines_for_prompts(replace(load, rate=rate * 1.5), target, 95.0) >= engines
    assert engines_for_prompts(load, target / 2, 95.0) >= engines


@given(st.floats(min_value=0.01, max_value=50), st.floats(min_value=1, max_value=2000), st.floats(1, 1e5))
def test_more_tokens_never_want_fewer_engines(rate: float, output: float, context: float) -> None:
    load = replace(TOKENS, rate=rate, output=output, context=context)
    engines = engines_for_tokens(load, 0.1, 0.8)
    assert engines_for_tokens(replace(load, rate=rate * 1.5), 0.1, 0.8) >= 0.999 * engines
