"""Requests of a trace, with prompts whose blocks are equal exactly where the trace says so."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from pdserve.core.request import MAX_SEED, Request, SamplingParams
from pdserve_loadgen.traces import TraceEntry

_UNSHARED = 2**30
"""Token ids from here on belong to one request each; below are hash ids."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """at: seconds after the simulation's start of load."""

    at: float
    request: Request


def from_trace(entries: Iterable[TraceEntry], *, seed: int = 0, timeout: float = 3600.0) -> Iterator[Arrival]:
    """Every token of a block is the block's hash id: cheap to build, and real block hashes find what is shared.

    A request is built when it is asked for, because a trace's prompts together fill gigabytes. Raises
    ValueError for a hash id that is no token id."""
    rng = Random(seed)
    for number, entry in enumerate(entries):
        sampling = SamplingParams(max_tokens=entry.output_tokens, seed=rng.randrange(MAX_SEED))
        request = Request(
            id=f"r{number}",
            prompt_token_ids=tuple(prompt_tokens(entry, _UNSHARED + number)),
            sampling=sampling,
            timeout=timeout,
        )
        yield Arrival(entry.at, request)


def prompt_tokens(entry: TraceEntry, unshared: int) -> list[int]:
    """entry.input_tokens token ids; what no hash id covers is `unshared`, which occurs in no other prompt."""
    tokens: list[int] = []
    for hash_id in entry.hash_ids:
        if not 0 <= hash_id < _UNSHARED:
            raise ValueError(f"hash id {hash_id} is not between 0 and {_UNSHARED - 1}")
        tokens += [hash_id] * entry.block_tokens
    missing = entry.input_tokens - len(tokens)
    return tokens[: entry.input_tokens] if missing <= 0 else tokens + [unshared] * missing
