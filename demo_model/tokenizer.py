"""Step 1: trains the byte-level BPE tokenizer on the training split only."""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_model import corpus
from demo_model.conversations import conversations
from demo_model.recipe import SPECIAL_TOKENS, VOCABULARY_SIZE

# Qwen's split: digits stay single, and runs of spaces before a word become one token, which indentation needs.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(texts: list[str]) -> Tokenizer:
    """Train the tokenizer on whole documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Read the corpus, train, and save tokenizer.json in the build folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--docs", type=Path, default=corpus.DEFAULT_DOCS)
    parser.add_argument("--stdlib", type=Path, default=corpus.DEFAULT_STDLIB)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.build.mkdir(parents=True, exist_ok=True)
    documents = corpus.load(args.docs, args.stdlib)
    texts = [document.text for document in documents if not document.held_out]
    chat = conversations(documents, held_out=False, seed=args.seed)
    # The vocabulary is meant for what the model will say, hence documentation and chat count twice.
    documentation = [document.text for document in documents if document.kind == "docs" and not document.held_out]
    spoken = ["\n".join(turn.content for turn in turns) for turns in chat]
    tokenizer = train(texts + documentation + spoken)
    tokenizer.save(str(args.build / "tokenizer.json"))
    print(f"{tokenizer.get_vocab_size()} tokens from {sum(map(len, texts)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    main()
