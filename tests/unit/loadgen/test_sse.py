"""Events come out whole, however their bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve_loadgen.endpoint import StreamReading
from pdserve_loadgen.sse import SseParser

STREAM = (
    b': hello\ndata: {"a": 1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\n'
    b"data: cr\r\rid: 7\n\n\ndata\n\ndata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"cr", b"", b"[DONE]"]


def parse(chunks: list[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_a_whole_stream_at_once() -> None:
    assert parse([STREAM]) == EVENTS


def test_every_byte_alone() -> None:
    assert parse([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cuts_give_the_same_events(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert parse([STREAM[a:b] for a, b in pairwise(edges)]) == EVENTS


def test_an_event_without_its_blank_line_is_not_given_out() -> None:
    parser = SseParser()
    assert parser.feed(b"data: half\n") == []
    assert parser.feed(b"\n") == [b"half"]


def test_characters_may_be_cut_in_their_middle() -> None:
    data = "data: é€😀\n\n".encode()
    assert parse([data[:8], data[8:11], data[11:]]) == ["é€😀".encode()]


def read(*events: bytes) -> tuple[StreamReading, list[bool]]:
    reading = StreamReading()
    return reading, [reading.take(event) for event in events]


def test_only_events_with_text_count_as_tokens() -> None:
    reading, carried = read(
        b'{"choices":[{"delta":{"role":"assistant","content":""}}]}',
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"delta":{"reasoning_content":"b"}}]}',
        b'{"choices":[{"text":"c"}]}',
        b'{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":null}',
        b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
        b"[DONE]",
    )
    assert carried == [False, True, True, True, False, False, False]
    assert ("".join(reading.text), reading.finished, reading.error) == ("abc", True, None)
    assert (reading.prompt_tokens, reading.completion_tokens) == (5, 3)


@pytest.mark.parametrize("event", [b"", b"{", b"[1]", b"7", b'{"choices":[3]}', b'{"usage":{"x":1}}'])
def test_what_is_no_chunk_is_an_error(event: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        StreamReading().take(event)


def test_an_error_event_keeps_its_code() -> None:
    reading, carried = read(b'{"error":{"message":"secret","code":"engine_died"}}')
    assert (reading.error, reading.finished, carried) == ("engine_died", False, [False])
