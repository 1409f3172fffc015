"""Step 7: checks that the exported folder is complete, small, loads without a warning and is what it claims to be."""

import argparse
import json
import warnings
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.recipe import SHAPE, SPECIAL_TOKENS, TURN_END_ID, VOCABULARY_SIZE, WINDOW, Turn, render_chat

_FILES: Final = (
    "LICENSE.python.txt",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
_MOST_BYTES: Final = 15_000_000


def check_files(folder: Path) -> None:
    """All files are there, the weights are bfloat16 and tied, and the whole is small enough to ship."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    assert not missing, f"missing: {missing}"
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= _MOST_BYTES, f"{size} bytes"
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in list(stored.keys())}
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == TURN_END_ID
    print(f"{size:,} bytes, {sum(tensor.numel() for tensor in tensors.values()):,} parameters")


def check_tokenizer(folder: Path) -> None:
    """The tokenizer is lossless and its chat template is the markup of the training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCABULARY_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    text = "def f(x):\n        return x + 12345  # naïve – 漢字 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turns = [Turn("system", "Be brief."), Turn("user", " Hi\n"), Turn("assistant", "Hello."), Turn("user", "Bye")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render_chat(turns) + "<|im_start|>assistant\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == render_chat([Turn("user", "Hi")])


def check_model(folder: Path) -> None:
    """The model loads, ties its embeddings, and computes finite logits far beyond the trained window."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.max_position_embeddings == SHAPE.positions
    tokens = torch.arange(4 * WINDOW).remainder(VOCABULARY_SIZE).unsqueeze(0)
    with torch.inference_mode():
        assert model(input_ids=tokens).logits.isfinite().all()


def main() -> None:
    """Run every check with warnings turned into errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("pdserve/assets/demo"))
    args = parser.parse_args()
    warnings.simplefilter("error")
    check_files(args.model)
    check_tokenizer(args.model)
    check_model(args.model)
    print("all checks passed")


if __name__ == "__main__":
    main()
