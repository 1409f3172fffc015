"""The figures every step must agree on: special tokens, chat markup, model shape, window and batch."""

from dataclasses import dataclass
from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, TURN_START, TURN_END)
END_OF_TEXT_ID: Final = 0
TURN_END_ID: Final = 2

VOCABULARY_SIZE: Final = 4096
WINDOW: Final = 512
# A window needs one token more than the model reads, because the last position has to predict something.
ROW: Final = WINDOW + 1

# Windows of each kind in a batch of eight. Chat is over-weighted: without many examples of a turn that ends,
# a model this small never stops answering.
WINDOWS_PER_BATCH: Final = {"docs": 3, "code": 2, "chat": 3}
# While the learning rate falls, half of a batch is what newcomers ask about first ("core"): facts seen then stay.
FINAL_WINDOWS_PER_BATCH: Final = {"docs": 1, "code": 1, "chat": 2, "core": 4}
KINDS: Final = tuple(WINDOWS_PER_BATCH)
TRAINED_KINDS: Final = tuple(FINAL_WINDOWS_PER_BATCH)
BATCH_TOKENS: Final = WINDOW * sum(WINDOWS_PER_BATCH.values())


@dataclass(frozen=True)
class Shape:
    """The Qwen3 shape of the demo model."""

    hidden: int = 256
    layers: int = 6
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 768
    positions: int = 8192
    rope_theta: float = 10000.0


SHAPE: Final = Shape()


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


def render_chat(turns: list[Turn]) -> str:
    """Render a conversation exactly as the shipped chat template does."""
    return "".join(f"{TURN_START}{turn.role}\n{turn.content}{TURN_END}\n" for turn in turns)
