"""Token ids to text as they arrive: whole characters only, and stop strings decided here."""

import codecs
from collections import deque
from collections.abc import Sequence

import msgspec

from pdserve.core.request import FinishReason, SamplingParams
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.stop_matcher import StopMatcher
from pdserve.gateway.vocabulary import Vocabulary


class OutputToken(msgspec.Struct, frozen=True, kw_only=True):
    """A generated token; logprob is natural, None unless asked for."""

    id: int
    logprob: float | None


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a request's text grew by.

    tokens are those whose text is complete in this or an earlier delta. finish_reason marks the last delta.
    """

    text: str
    tokens: tuple[OutputToken, ...]
    finish_reason: FinishReason | None = None


class Detokenizer:
    """One request's text. Its deltas, joined, are the decoded tokens up to the first stop string.

    The text continues the prompt: a leading space of the first token stays. Bytes that are not UTF-8 become
    U+FFFD, also those of a character that max_tokens cut in two. The token that ended the sequence (EOS or
    a stop id) has no text. Stop strings are looked for after the first min_tokens tokens.
    """

    def __init__(self, vocabulary: Vocabulary, sampling: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._min_tokens = sampling.min_tokens
        self._enders = frozenset(sampling.stop_token_ids) | frozenset(eos_token_ids)
        self._matcher = StopMatcher(sampling.stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: deque[tuple[OutputToken, int, int]] = deque()
        self._decoded = 0
        self._shown = 0
        self.num_tokens = 0

    def push(self, delta: TokenDelta) -> TextDelta:
        """Text and tokens a delta makes final. Not called again after a delta with a finish_reason."""
        shown: list[str] = []
        logprobs = delta.logprobs or (None,) * len(delta.token_ids)
        for i, (token_id, logprob) in enumerate(zip(delta.token_ids, logprobs, strict=True)):
            last = i == len(delta.token_ids) - 1
            ends = last and delta.finish_reason is FinishReason.STOP and token_id in self._enders
            text, stopped = self._push_token(OutputToken(id=token_id, logprob=logprob), hidden=ends)
            shown.append(text)
            if stopped:
                return self._finish(shown, FinishReason.STOP)
        if delta.finish_reason is not None:
            return self._flush(shown, delta.finish_reason)
        return TextDelta(text="".join(shown), tokens=self._release(self._shown))

    def _push_token(self, token: OutputToken, hidden: bool) -> tuple[str, bool]:
        text = self._utf8.decode(b"" if hidden else self._vocabulary.text_bytes(token.id))
        start = self._decoded
        self._decoded += len(text)
        self.num_tokens += 1
        unfinished_character = bool(self._utf8.getstate()[0])
        self._pending.append((token, start, self._decoded + unfinished_character))
        return self._show(text)

    def _show(self, text: str) -> tuple[str, bool]:
        stopped = False
        if self.num_tokens > self._min_tokens:
            text, stopped = self._matcher.feed(text)
        self._shown += len(text)
        return text, stopped

    def _flush(self, shown: list[str], reason: FinishReason) -> TextDelta:
        text, stopped = self._show(self._utf8.decode(b"", final=True))
        shown.append(text)
        if stopped:
            return self._finish(shown, FinishReason.STOP)
        shown.append(self._matcher.flush())
        tokens = tuple(token for token, _, _ in self._pending)
        return TextDelta(text="".join(shown), tokens=tokens, finish_reason=reason)

    def _finish(self, shown: list[str], reason: FinishReason) -> TextDelta:
        """A stop string cut the text: tokens that lie in it altogether are dropped."""
        tokens = tuple(token for token, start, _ in self._pending if start < self._shown)
        return TextDelta(text="".join(shown), tokens=tokens, finish_reason=reason)

    def _release(self, length: int) -> tuple[OutputToken, ...]:
        released = []
        while self._pending and self._pending[0][2] <= length:
            released.append(self._pending.popleft()[0])
        return tuple(released)
