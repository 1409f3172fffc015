"""Kernels compiled for Hopper (sm_90a) on a machine without one, and what they would use of it.

compile_for_hopper runs this module as a program: where tests run, kernels are decorated for the interpreter.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

SHARED_BYTES = 227 * 1024
"""Shared memory one program may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A kernel as one launch would specialise it.

    signature: type by argument as in triton.tools.compile: "*bf16:16" is an aligned pointer, as torch allocates
    them, "i64:16" a number divisible by 16. constants: every constexpr argument.
    """

    module: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """shared in bytes per program; registers and stack bytes per thread. A stack means spilled registers."""

    ptx: str
    shared: int
    registers: int
    stack: int

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many fit side by side, by shared memory (228 KiB, of which each program costs another KiB)."""
        return 228 * 1024 // (self.shared + 1024)


def compile_for_hopper(*builds: Build) -> list[Built]:
    """One process for all of them; a compiler's error fails with its text."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([asdict(build) for build in builds]),
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Built(**fields) for fields in json.loads(done.stdout)]


def _compiled(build: Build) -> Built:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(build.module), build.kernel)
    types = {name: build.signature.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(
        fn=function,
        signature={name: kind.partition(":")[0] for name, kind in types.items()},
        constexprs=dict(build.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.endswith(":16")},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Built(ptx=compiled.asm["ptx"], shared=compiled.metadata.shared, registers=usage["REG"], stack=usage["STACK"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump tells of a cubin's only function, as in "REG:96 STACK:0 SHARED:0 …"."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
    line = next(line for line in told.splitlines() if "REG:" in line)
    return {name: int(number) for name, _, number in (field.partition(":") for field in line.split()) if number}


if __name__ == "__main__":
    built = [_compiled(Build(**fields)) for fields in json.load(sys.stdin)]
    json.dump([asdict(each) for each in built], sys.stdout)
