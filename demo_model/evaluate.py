"""Step 5: perplexities of the exported model and of the n-gram baselines on the same held-out tokens."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from demo_model.baselines import Baselines
from demo_model.encode import token_file
from demo_model.recipe import KINDS, ROW, WINDOW

_BATCH = 8


def _stream(build: Path, kind: str, split: str) -> NDArray[np.uint16]:
    tokens: NDArray[np.uint16] = np.load(token_file(build, kind, split), allow_pickle=False)
    return tokens


def perplexity(model: PreTrainedModel, tokens: NDArray[np.uint16]) -> float:
    """Score the stream in windows that share one token, so that each token after the first is predicted once."""
    starts = range(0, len(tokens) - ROW + 1, WINDOW)
    rows = torch.from_numpy(np.stack([tokens[start : start + ROW].astype(np.int64) for start in starts]))
    total = 0.0
    with torch.inference_mode():
        for batch in torch.split(rows, _BATCH):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
            total += functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (len(rows) * WINDOW))


def main() -> None:
    """Print a table of the figures and keep them in the build folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--model", type=Path, default=Path("pdserve/assets/demo"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Weights as shipped, arithmetic in float32.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    baselines = Baselines([_stream(args.build, kind, "train") for kind in KINDS])
    figures: dict[str, dict[str, float]] = {}
    print("kind   tokens  unigram  trigram  model")
    for kind in KINDS:
        held_out = _stream(args.build, kind, "held")
        unigram, trigram = baselines.perplexities(held_out)
        figures[kind] = {"unigram": unigram, "trigram": trigram, "model": perplexity(model, held_out)}
        print(f"{kind:5} {len(held_out):7} {unigram:8.1f} {trigram:8.1f} {figures[kind]['model']:6.2f}")
    (args.build / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
