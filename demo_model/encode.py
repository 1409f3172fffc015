"""Step 2: turns the corpus and the conversations into token files, one per kind and split."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from demo_model import corpus
from demo_model.conversations import conversations
from demo_model.corpus import Document
from demo_model.recipe import END_OF_TEXT_ID, KINDS, ROW, TRAINED_KINDS, Turn, render_chat

Tokens = NDArray[np.uint16]

# Each pass words the same pairs differently; after these the wordings repeat.
_CHAT_PASSES: Final = 6


def token_file(build: Path, kind: str, split: str) -> Path:
    """Name the file that holds the tokens of one kind and split."""
    return build / f"tokens-{kind}-{split}.npy"


def _joined(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokens:
    encodings = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16) for encoding in encodings])


def _packed_rows(tokenizer: Tokenizer, talks: list[list[Turn]]) -> Tokens:
    """Fill rows that all begin with a conversation, as every prompt does; the last one of a row is cut off."""
    encodings = tokenizer.encode_batch([render_chat(turns) for turns in talks])
    rows: list[NDArray[np.uint16]] = []
    row: list[int] = []
    for encoding in encodings:
        row.extend([*encoding.ids, END_OF_TEXT_ID])
        if len(row) >= ROW:
            rows.append(np.array(row[:ROW], dtype=np.uint16))
            row = []
    return np.concatenate(rows)


def _training_chat(tokenizer: Tokenizer, documents: list[Document], seed: int, core: bool) -> Tokens:
    passes = range(seed, seed + _CHAT_PASSES)
    return np.concatenate([_packed_rows(tokenizer, conversations(documents, False, number, core)) for number in passes])


def main() -> None:
    """Encode every kind for both splits and report the sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--docs", type=Path, default=corpus.DEFAULT_DOCS)
    parser.add_argument("--stdlib", type=Path, default=corpus.DEFAULT_STDLIB)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.build / "tokenizer.json"))
    documents = corpus.load(args.docs, args.stdlib)
    for split in ("train", "held"):
        chosen = [document for document in documents if document.held_out == (split == "held")]
        for kind in TRAINED_KINDS if split == "train" else KINDS:
            if kind in ("chat", "core") and split == "train":
                tokens = _training_chat(tokenizer, documents, args.seed, core=kind == "core")
            elif kind == "chat":
                talks = conversations(documents, True, args.seed)
                tokens = _joined(tokenizer, [render_chat(turns) for turns in talks])
            else:
                tokens = _joined(tokenizer, [document.text for document in chosen if document.kind == kind])
            np.save(token_file(args.build, kind, split), tokens, allow_pickle=False)
            print(f"{kind:5} {split:6} {len(tokens):>10,} tokens")


if __name__ == "__main__":
    main()
