"""Kernels are interpreted where there is no GPU to run them; Triton looks once, when it is first imported."""

import os
import shutil
from typing import Any

import numpy as np
import pytest

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted tl.dot adds an element's products one after the other, as a compiled one does whatever rows are
    beside it. NumPy's product, which it takes otherwise, adds by shape and processor."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def dot(self: object, a: Any, b: Any, total: Any, *precision: object) -> Any:
        dtype = total.data.dtype
        left, right = a.data.astype(dtype), b.data.astype(dtype)
        added = np.zeros_like(total.data)
        for place in range(left.shape[-1]):
            added += left[..., place : place + 1] * right[..., place : place + 1, :]
        return interpreter.TensorHandle(total.data + added, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
