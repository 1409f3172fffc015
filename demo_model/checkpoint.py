"""Saves and restores training as safetensors, replacing the previous checkpoint only when the new one is complete."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass
class Progress:
    """How far training has come; `seconds` counts training time over all resumed runs."""

    step: int = 0
    seconds: float = 0.0


def _path(build: Path) -> Path:
    return build / "checkpoint.safetensors"


def save(build: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write weights, optimizer moments and progress into one file."""
    tensors = {f"model.{name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().clone()
    unfinished = _path(build).with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(unfinished, _path(build))


def load(build: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress | None:
    """Restore the last checkpoint into the model and the optimizer, or return None when there is none."""
    if not _path(build).exists():
        return None
    with safe_open(_path(build), framework="pt") as stored, torch.no_grad():
        stored_keys = list(stored.keys())
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.get_tensor(f"model.{name}"))
            if optimizer is not None:
                keys = [key for key in stored_keys if key.startswith("optimizer.") and key.endswith(f".{name}")]
                optimizer.state[parameter] = {key.split(".")[1]: stored.get_tensor(key) for key in keys}
        return Progress(**json.loads(stored.metadata()["progress"]))
