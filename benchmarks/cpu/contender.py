"""What each of those compared can be asked to do."""

from collections.abc import Sequence
from typing import Protocol

Prompt = tuple[int, ...]


class Contender(Protocol):
    """A loaded model that decodes greedily, on one thread."""

    name: str
    how: str
    """What runs, and in which of its modes."""

    def prefill(self, prompt: Prompt) -> int:
        """Compute a prompt nobody has seen; the token it chooses."""
        ...

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Have the KV of as many sequences as there are prompts, all of one length, ready to decode. Only the first
        prompt is sure to be computed: a copy of its KV does for the others. Ends what was begun before."""
        ...

    def step(self) -> list[int]:
        """One more token of every sequence."""
        ...

    def close(self) -> None: ...
