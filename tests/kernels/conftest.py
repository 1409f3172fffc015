"""What of the kernel tests can be collected here, and memory that shows what a kernel must not read or leave out."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if find_spec("triton") else ["test_*_kernel.py"]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors allocated without a value hold NaN, or the least integer: what a kernel leaves unwritten shows."""

    def poison(allocate: Any) -> Any:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **options)
            least = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
            return tensor.fill_(least)

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
