"""Trial requests: does the endpoint answer, and how many tokens does it count for how many words?"""

from pdserve_loadgen.client import Answer, Client
from pdserve_loadgen.endpoint import Exchange
from pdserve_loadgen.errors import Unreachable
from pdserve_loadgen.prompts import PromptWriter, Sizing, fit
from pdserve_loadgen.result import Outcome

SHORT = 16
LONG = (272, 64, 32)
"""Words. The longer the better the fit; a small model may refuse the first."""


async def size_prompts(client: Client, writer: PromptWriter) -> tuple[Sizing, list[str]]:
    """The sizing the server's counts suggest, and notes for the report: none when it counts.

    Raises Unreachable when it does not answer."""
    short = await _probe(client, writer, SHORT)
    for words in LONG:
        long = await _probe(client, writer, words)
        if not (long.error or "").startswith("http_4"):
            break
    for answer in (short, long):
        if answer.outcome is not Outcome.OK:
            raise Unreachable(f"a trial request failed: {answer.error}; check --url, --model, --api-key, --extra-body")
    if short.prompt_tokens is None or long.prompt_tokens is None:
        return Sizing(), ["the server reports no usage: input lengths are estimates, output tokens are counted events"]
    return fit((SHORT, short.prompt_tokens), (words, long.prompt_tokens)), []


async def _probe(client: Client, writer: PromptWriter, words: int) -> Answer:
    return await client.send(Exchange((writer.probe(words),)), 1, f"loadgen-probe-{words}")
