"""A model's generation_config.json decides what clients leave open, and nothing else."""

import json
from pathlib import Path

import pytest

from pdserve.core.errors import CheckpointError
from pdserve.gateway.http.schemas import CompletionBody
from pdserve.gateway.sampling_defaults import load_sampling_defaults


def written(folder: Path, **content: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_recommendations_are_read_and_other_keys_left_alone(tmp_path: Path) -> None:
    folder = written(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_length=4096, eos_token_id=2)
    assert load_sampling_defaults(folder) == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}


def test_a_model_without_recommendations_has_none(tmp_path: Path) -> None:
    assert load_sampling_defaults(tmp_path) == {}
    assert load_sampling_defaults(written(tmp_path, do_sample=False, temperature=0.6)) == {}


@pytest.mark.parametrize("content", ["{", '{"temperature": -1}'])
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_sampling_defaults(tmp_path)


def test_what_a_client_says_wins_over_the_models_defaults() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    body = CompletionBody(prompt="x", temperature=0.0, top_k=-1)
    sampling = body.sampling(max_tokens=4, logprobs=False, defaults=defaults)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 0.9)
