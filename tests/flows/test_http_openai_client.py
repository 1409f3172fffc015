"""The real openai package against the gateway: streamed and whole, both endpoints."""

from collections.abc import Iterator

import pytest
from openai import APIError, BadRequestError, NotFoundError, OpenAI, RateLimitError
from openai.types.chat import ChatCompletionContentPartTextParam, ChatCompletionMessageParam
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import EngineDied, Overloaded
from pdserve.core.request import FinishReason
from pdserve.gateway.tokenizer import Tokenizer
from tests import tiny_tokenizers as tiny
from tests.scripted_generator import EPOCH, ScriptedGenerator, http_server, speak

SPOKEN = "the answer: é🙂."


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    return FastTokenizer.from_file(str(tiny.byte_level(tmp_path_factory.mktemp("model")) / "tokenizer.json"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, fast: FastTokenizer) -> Iterator[tuple[OpenAI, ScriptedGenerator]]:
    generator = ScriptedGenerator(speak(fast, SPOKEN))
    tokenizer = Tokenizer.load(tiny.byte_level(tmp_path_factory.mktemp("served")))
    with (
        http_server(generator, tokenizer) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=10) as client,
    ):
        yield client, generator


@pytest.fixture
def client(served: tuple[OpenAI, ScriptedGenerator], fast: FastTokenizer) -> OpenAI:
    served[1].script = speak(fast, SPOKEN)
    served[1].requests.clear()
    return served[0]


@pytest.fixture
def generator(served: tuple[OpenAI, ScriptedGenerator]) -> ScriptedGenerator:
    return served[1]


HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "pdserve"
    with pytest.raises(NotFoundError):
        client.models.retrieve("other")


def test_chat_answers_with_text_usage_and_record(
    client: OpenAI, generator: ScriptedGenerator, fast: FastTokenizer
) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    prompt = fast.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n").ids
    assert list(generator.requests[0].prompt_token_ids) == prompt
    assert generator.requests[0].sampling.max_tokens == tiny.MODEL.max_model_len - len(prompt)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", SPOKEN)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(fast.encode(SPOKEN).ids)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.model_extra is not None
    record = answer.model_extra["pdserve"]
    assert record["mode"] == "disaggregated"
    assert record["prefill"]["epoch"] == str(EPOCH)
    assert record["stamps"]["closed"] == 1.0, "the record is read after the request ended"
    assert record["request_id"] == answer.id


def test_streamed_chat_is_the_whole_chat_in_pieces(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == SPOKEN
    assert not any("\ufffd" in text for text in texts)
    finals = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [final.choices[0].finish_reason for final in finals] == ["length"]
    assert finals[0].model_extra is not None
    assert finals[0].model_extra["pdserve"]["decode"] is None
    assert finals[0].model_extra["pdserve"]["stamps"]["closed"] == 1.0
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_has_no_usage_unless_asked_for(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_content_parts_are_joined_and_unknown_fields_ignored(
    client: OpenAI, generator: ScriptedGenerator, fast: FastTokenizer
) -> None:
    parts: list[ChatCompletionContentPartTextParam] = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}],
        max_completion_tokens=5,
        user="someone",
        extra_body={"top_k": 7, "min_p": 0.1, "ignore_eos": True, "min_tokens": 2, "repetition_penalty": 1.2, "who": 1},
    )
    request = generator.requests[0]
    assert fast.decode(list(request.prompt_token_ids), skip_special_tokens=False).startswith(
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>"
    )
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.min_p) == (5, 7, 0.1)
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.repetition_penalty) == (True, 2, 1.2)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_and_the_request(client: OpenAI, generator: ScriptedGenerator, stream: bool) -> None:
    generator.closed.clear()
    if stream:
        chunks = list(client.completions.create(model="tiny", prompt="say", stop=["er: "], stream=True))
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(model="tiny", prompt="say", stop="er: ").choices[0]
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == ("the answ", "stop")
    assert generator.closed.wait(5)


def test_completion_takes_text_and_token_ids(client: OpenAI, generator: ScriptedGenerator, fast: FastTokenizer) -> None:
    ids = fast.encode("the end").ids
    prompts: list[str | list[int] | list[str] | list[list[int]]] = ["the end", ids, ["the end"], [ids]]
    for prompt in prompts:
        assert client.completions.create(model="tiny", prompt=prompt).choices[0].text == SPOKEN
    assert [list(request.prompt_token_ids) for request in generator.requests] == [ids] * 4
    assert {request.sampling.max_tokens for request in generator.requests} == {16}
    assert len({request.sampling.seed for request in generator.requests}) == 4, "a seed is drawn for each"


def test_chat_logprobs_of_chosen_tokens(client: OpenAI, fast: FastTokenizer) -> None:
    choice = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == SPOKEN
    assert [token.logprob for token in tokens] == [-0.5 * i for i in range(len(fast.encode(SPOKEN).ids))]
    assert tokens[0].top_logprobs == []


def test_completion_logprobs_are_the_same_streamed_and_whole(client: OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="say", logprobs=0).choices[0].logprobs
    chunks = list(client.completions.create(model="tiny", prompt="say", logprobs=0, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert whole is not None
    assert whole.tokens == [token for part in parts if part for token in part.tokens or []]
    assert whole.token_logprobs == [value for part in parts if part for value in part.token_logprobs or []]
    assert whole.text_offset == [offset for part in parts if part for offset in part.text_offset or []]
    assert whole.text_offset is not None
    assert (whole.text_offset[0], whole.text_offset[1]) == (0, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token_has_its_status(
    client: OpenAI, generator: ScriptedGenerator, stream: bool
) -> None:
    generator.script = lambda request: [Overloaded("queue is full", retry_after=2.2)]
    with pytest.raises(RateLimitError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "overloaded"


def test_error_in_the_middle_of_a_stream_reaches_the_client(
    client: OpenAI, generator: ScriptedGenerator, fast: FastTokenizer
) -> None:
    half = speak(fast, "half", end=None)
    generator.script = lambda request: [*half(request), EngineDied("decode-0 is gone")]
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    received = [next(stream).choices[0].delta.content for _ in range(1 + len(fast.encode("half").ids))]
    assert "".join(filter(None, received)) == "half"
    with pytest.raises(APIError, match="decode-0 is gone") as caught:
        next(stream)
    assert caught.value.code == "engine_died"


def test_unsupported_parameter_is_named(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, n=2)
    assert (caught.value.code, caught.value.param) == ("unsupported", "n")


def test_end_of_sequence_finishes_with_stop(client: OpenAI, generator: ScriptedGenerator, fast: FastTokenizer) -> None:
    generator.script = speak(fast, "bye<|im_end|>", end=FinishReason.STOP)
    choice = client.chat.completions.create(model="tiny", messages=HELLO).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("bye", "stop")
