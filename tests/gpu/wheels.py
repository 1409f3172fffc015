"""Download what the GPU suite needs besides torch, Triton, NumPy, safetensors, transformers and pytest.

    python -m tests.gpu.wheels build/wheels

Wheels for CPython 3.12 on x86-64 Linux, small enough to be carried to a machine that reaches nothing: NIXL without its
expert-parallel extension, which is most of its size and nothing pdserve uses. `make test-gpu` installs them from there.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

PACKAGES = ("nixl-cu13>=1.5.1,<2", "blake3>=1", "msgspec>=0.19", "xxhash>=3.5", "pytest-asyncio>=1")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = "nixl_ep_cu13/"


def download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", *platforms, "--dest", str(folder), *PACKAGES]
    subprocess.run(command, check=True)


def thin(wheel: Path) -> None:
    """Leave the extension out of NIXL's wheel."""
    draft = wheel.with_suffix(".new")
    with ZipFile(wheel) as source, ZipFile(draft, "w", ZIP_DEFLATED, compresslevel=9) as target:
        for item in source.infolist():
            if item.filename.startswith(LEFT_OUT):
                continue
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.splitlines(keepends=True)
                data = b"".join(line for line in lines if not line.startswith(LEFT_OUT.encode()))
            target.writestr(item, data)
    draft.replace(wheel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    download(folder)
    for wheel in folder.glob("nixl_cu13-*.whl"):
        thin(wheel)
    total = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{folder}: {total / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
