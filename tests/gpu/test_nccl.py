"""NCCL and one GPU."""

import socket
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RANK = """
import sys
import torch
from datetime import timedelta
from torch import distributed as dist

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
group = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())
tensor = torch.ones(8, device="cuda:0")
group.allreduce([tensor]).wait()
torch.cuda.synchronize()
"""


def test_nccl_refuses_two_ranks_on_one_gpu(unused_port: int) -> None:
    """Why its proof is that of gloo, which runs the same protocol. Should this fail, prove it with NCCL as well."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(unused_port)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert any("Duplicate GPU" in text or "invalid usage" in text for text in said), said
    assert all(rank.returncode for rank in ranks)


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
