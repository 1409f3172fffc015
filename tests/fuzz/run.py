"""Coverage-guided fuzzing of the parsers: `python -m tests.fuzz.run TARGET [libFuzzer options]`, or --list.

An input that breaks a target is written to -artifact_prefix and belongs into test_targets.py.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["pdserve.rpc.convert", "pdserve.core", "pdserve.transfer", "pdserve.worker"]):
    from pdserve.core.errors import PdserveError
    from tests.fuzz.targets import TARGETS


def mutator(examples: tuple[bytes, ...]) -> Callable[[bytes, int, int], bytes]:
    """Every other input starts from a valid message again: parsers written in C give no coverage to be led by."""

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.getrandbits(1):
            data = random.choice(examples)
        for _ in range(random.randint(1, 4)):
            data = atheris.Mutate(data, max(max_size, len(data)))
        return data

    return mutate


def main(name: str, options: list[str]) -> None:
    """Run one target until the options' limit, starting from its examples."""
    fuzzed = TARGETS[name]

    def one_input(data: bytes) -> None:
        with suppress(PdserveError):
            fuzzed.target(data)

    with tempfile.TemporaryDirectory(prefix="pdserve-fuzz-") as folder:
        for number, example in enumerate(fuzzed.examples):
            (Path(folder) / str(number)).write_bytes(example)
        atheris.Setup([sys.argv[0], *options, folder], one_input, custom_mutator=mutator(fuzzed.examples))
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:] == ["--list"]:
        print(*TARGETS)
    else:
        main(sys.argv[1], sys.argv[2:])
