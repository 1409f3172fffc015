"""Step 4: writes the last checkpoint as a Hugging Face model folder."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from demo_model import checkpoint, corpus
from demo_model.model import build
from demo_model.recipe import END_OF_TEXT, END_OF_TEXT_ID, SHAPE, TURN_END, TURN_END_ID, TURN_START

# Clients may send the text of a message in parts, which are joined here.
CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# fmt: off
_CONFIG_KEYS: Final = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "attention_bias", "attention_dropout", "use_sliding_window", "tie_word_embeddings", "initializer_range",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
)
# fmt: on


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(build_folder: Path, out: Path) -> None:
    """Write the tokenizer with the chat template, both as a file and where older clients look for it."""
    shutil.copyfile(build_folder / "tokenizer.json", out / "tokenizer.json")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "additional_special_tokens": [TURN_START],
            "clean_up_tokenization_spaces": False,
            "model_max_length": SHAPE.positions,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_model(build_folder: Path, out: Path) -> checkpoint.Progress:
    """Write the weights in bfloat16 with their configuration, and return how far they were trained."""
    model = build(0)
    progress = checkpoint.load(build_folder, model)
    if progress is None:
        raise SystemExit(f"no checkpoint in {build_folder}: run demo_model.train first")
    weights = {name: value.detach().to(torch.bfloat16) for name, value in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    settings = model.config.to_dict()
    # Older readers look for torch_dtype and rope_theta, newer ones for dtype and rope_parameters.
    config: dict[str, object] = {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config |= {key: settings[key] for key in _CONFIG_KEYS} | {"rope_theta": SHAPE.rope_theta}
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "eos_token_id": [TURN_END_ID, END_OF_TEXT_ID],
            "pad_token_id": END_OF_TEXT_ID,
        },
    )
    return progress


def main() -> None:
    """Export and report the training progress of what was exported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("pdserve/assets/demo"))
    parser.add_argument("--licence", type=Path, default=corpus.DEFAULT_STDLIB / "LICENSE.txt")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.licence, args.out / "LICENSE.python.txt")
    write_tokenizer(args.build, args.out)
    progress = write_model(args.build, args.out)
    print(f"exported step {progress.step} after {progress.seconds / 60:.1f} minutes to {args.out}")


if __name__ == "__main__":
    main()
