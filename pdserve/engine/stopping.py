"""When a sequence ends by its tokens. Pure functions; stop strings are decided where text exists, in the gateway."""

from dataclasses import dataclass

from pdserve.core.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """What ends one sequence.

    stop_ids end it once min_tokens tokens were there before; max_output_tokens ends it in any case.
    """

    stop_ids: frozenset[int]
    min_tokens: int
    max_output_tokens: int

    def reason(self, token_id: int, num_output_tokens: int) -> FinishReason | None:
        """Does this token, the num_output_tokens-th (counted from 1), end the sequence?"""
        if token_id in self.stop_ids and num_output_tokens > self.min_tokens:
            return FinishReason.STOP
        if num_output_tokens >= self.max_output_tokens:
            return FinishReason.LENGTH
        return None


def stop_rule(sampling: SamplingParams, *, prompt_len: int, eos_token_ids: tuple[int, ...], max_len: int) -> StopRule:
    """The rule for a request on an engine where prompt and output together hold at most max_len tokens."""
    eos = () if sampling.ignore_eos else eos_token_ids
    return StopRule(
        stop_ids=frozenset(sampling.stop_token_ids) | frozenset(eos),
        min_tokens=sampling.min_tokens,
        max_output_tokens=min(sampling.max_tokens, max_len - prompt_len),
    )
