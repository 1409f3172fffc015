"""A lease that ends while a backend reads: whatever the backend, the KV is not decoded and all blocks come back."""

import asyncio
from pathlib import Path

import pytest

from pdserve.config.times import Times
from pdserve.core.endpoint import EngineLimits, Role
from pdserve.core.errors import LeaseExpired
from pdserve.core.request import SamplingParams
from pdserve.dispatch.replay import ReplayRules
from pdserve.transfer.backends import make_backends
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.clocks import ManualClock
from tests.flows.inproc import NodeSpec, PairsOnly, open_cluster
from tests.transfer_faults import FaultyBackend

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=4, ignore_eos=True)
PROMPT = [(7 * i + 3) % VOCAB_SIZE for i in range(90)]
SELDOM = Times(heartbeat=1000.0, suspect=3000.0, transfer_deadline=3000.0)
"""No heartbeat renews a lease while the test lets it run out."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.mark.parametrize("name", ["nixl", "shared_memory", "gloo", "grpc", "loopback"])
async def test_kv_read_under_a_lease_that_ended_is_never_decoded(checkpoint: Path, name: str) -> None:
    clock = ManualClock()
    (source,), (target,) = make_backends((name,), "p", 1), make_backends((name,), "d", 2)
    wire = FaultyBackend(target)
    specs = {
        "p": NodeSpec(role=Role.PREFILL, limits=EngineLimits(chunk_size=32), backend=source),
        "d": NodeSpec(role=Role.DECODE, backend=wire),
    }
    once = ReplayRules(max_attempts=1)
    async with open_cluster(checkpoint, specs, times=SELDOM, clock=clock, policy=PairsOnly(), replay=once) as cluster:
        wire.held = True
        asking = asyncio.create_task(cluster.answer(PROMPT, GREEDY))
        async with asyncio.timeout(30):
            while not wire.posted:
                await asyncio.sleep(0.005)
            await clock.advance(SELDOM.lease + 1)
            with pytest.raises(LeaseExpired):
                await asking
            blocks = cluster.engines["d"].snapshot().blocks
            assert blocks.quarantined > 0, "the read has not ended"
            assert cluster.engines["p"].source.num_open == 0
            wire.held = False
            await cluster.until_idle()
            assert len((await cluster.answer(PROMPT, GREEDY)).token_ids) == GREEDY.max_tokens
