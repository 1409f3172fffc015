"""The files of a checkpoint directory: which hold the weights, and a name for what they say."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from struct import unpack

from pdserve.core.errors import CheckpointError
from pdserve.model.config import ModelConfig, read_json, token_ids

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLES = 256
_SAMPLE_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that together hold the weights, in name order. Raises CheckpointError."""
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{path / INDEX} must map tensor names to file names in its weight_map")
    else:
        names = {SINGLE}
    files = [path / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; weights are read from safetensors files only")
    return files


def model_revision(path: Path) -> str:
    """16 hex digits naming a model's content, the same on every machine that holds the same files.

    Hashed are config.json and, of each weight file, size, header (names, types, shapes) and 256 evenly spaced
    samples of 512 bytes. That tells fine-tunes of one model apart in milliseconds, however large they are; two
    checkpoints made to differ only between the samples would collide.
    """
    digest = sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        for part in _revealing_parts(file):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _revealing_parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    with file.open("rb") as stream:
        start = stream.read(8)
        header_bytes = unpack("<Q", start)[0] if len(start) == 8 else size
        if header_bytes > min(size, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{file} is not a valid safetensors file")
        yield stream.read(header_bytes)
        step = max(_SAMPLE_BYTES, (size - 8 - header_bytes) // _SAMPLES)
        for offset in range(8 + header_bytes, size, step):
            stream.seek(offset)
            yield stream.read(_SAMPLE_BYTES)


def eos_token_ids(path: Path, config: ModelConfig) -> tuple[int, ...]:
    """Tokens that end a sequence: those of generation_config.json first, then those of config.json."""
    file = path / "generation_config.json"
    generation = token_ids(read_json(file).get("eos_token_id")) if file.exists() else ()
    return tuple(dict.fromkeys(generation + config.eos_token_ids))
