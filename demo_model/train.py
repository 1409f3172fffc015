"""Step 3: trains the model within a budget of minutes or steps, resuming from the last checkpoint."""

import argparse
import time
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional

from demo_model import checkpoint
from demo_model.batches import Batches
from demo_model.checkpoint import Progress
from demo_model.model import build
from demo_model.recipe import BATCH_TOKENS

_PEAK_RATE: Final = 3e-3
_WARM_UP_STEPS: Final = 60
_CONSTANT_UNTIL: Final = 0.6
_FINAL_SHARE: Final = 0.05


def learning_rate(step: int, done: float) -> float:
    """Warm up by steps, then hold, then fall linearly over the rest of the budget, of which `done` is spent."""
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    fall = max(0.0, (min(done, 1.0) - _CONSTANT_UNTIL) / (1 - _CONSTANT_UNTIL))
    return _PEAK_RATE * warm * (1 - fall * (1 - _FINAL_SHARE))


def _optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=_PEAK_RATE, betas=(0.9, 0.95))


class Trainer:
    """One model, its optimizer and its place in the data."""

    def __init__(self, folder: Path, seed: int, compiled: bool) -> None:
        """Build the model and restore the last checkpoint of the folder, if there is one."""
        self.folder = folder
        self.model = build(seed)
        self.optimizer = _optimizer(self.model)
        self.batches = Batches(folder, seed)
        self.progress = checkpoint.load(folder, self.model, self.optimizer) or Progress()
        self._loss = torch.compile(self._plain_loss) if compiled else self._plain_loss

    def _plain_loss(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    def step(self, rate: float, final: bool) -> torch.Tensor:
        """Take one optimizer step and return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss: torch.Tensor = self._loss(self.batches.at(self.progress.step, final))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return loss.detach()

    def save(self) -> None:
        """Write a checkpoint."""
        checkpoint.save(self.folder, self.model, self.optimizer, self.progress)


def run(trainer: Trainer, steps: int | None, minutes: float, save_minutes: float) -> None:
    """Train until the budget is spent: a number of steps if given, which is reproducible, otherwise minutes."""
    progress = trainer.progress
    began = time.monotonic() - progress.seconds
    saved = progress.seconds
    recent: torch.Tensor | None = None
    while True:
        done = progress.step / steps if steps else progress.seconds / (60 * minutes)
        if done >= 1:
            break
        rate = learning_rate(progress.step, done)
        loss = trainer.step(rate, final=done > _CONSTANT_UNTIL)
        recent = loss if recent is None else 0.95 * recent + 0.05 * loss
        progress.seconds = time.monotonic() - began
        if progress.step % 25 == 0 or progress.step == 1:
            tokens = progress.step * BATCH_TOKENS
            print(
                f"step {progress.step} tokens {tokens / 1e6:.2f}M loss {recent.item():.3f} lr {rate:.2e} "
                f"{tokens / progress.seconds:.0f} tok/s {progress.seconds / 60:.1f} min",
                flush=True,
            )
        if progress.seconds - saved > 60 * save_minutes:
            trainer.save()
            saved = progress.seconds
    trainer.save()


def main() -> None:
    """Parse the budget and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.build, args.seed, compiled=not args.no_compile)
    run(trainer, args.steps, args.minutes, args.save_minutes)


if __name__ == "__main__":
    main()
