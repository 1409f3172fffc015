"""A peer that cannot be reached when it is connected, as when its line was cut just before: it costs the others
nothing."""

import asyncio

import pytest

from pdserve.core.errors import TransferTimeout
from tests.contract.sources import InChild, Source
from tests.contract.transfer_bench import Bench, Kind, pull, spec_for
from tests.kv_layouts import kv_layout
from tests.namespaces import THIS_MACHINE, Hosts, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("kind", [Kind("nixl", {"UCX_TLS": "tcp,self"})], ids=str, indirect=True, scope="module"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(60),
]

LAYOUT = kv_layout(4)


async def source_on(bench: Bench, hosts: Hosts, name: str) -> Source:
    child = InChild(bench.kind.env, ("ip", "netns", "exec", f"{hosts.prefix}{name}"))
    bench.stack.callback(child.end)
    return await bench.source(LAYOUT, driver=child, engine_id=name)


async def test_reads_from_other_peers_go_on_while_one_cannot_be_connected(bench: Bench) -> None:
    with Hosts(("well", "lost")) as hosts:
        well, lost = [await source_on(bench, hosts, name) for name in ("well", "lost")]
        service, _ = await bench.target(LAYOUT)
        await service.connect(well.address)
        await pull(service, await spec_for(well, (0,), (0,)))
        from_lost = await spec_for(lost, (1,), (1,), deadline=1.5)
        with hosts.cut(("lost", THIS_MACHINE)):
            await asyncio.wait_for(service.connect(lost.address), 1)
            waiting = service.pull(from_lost)
            for _ in range(10):
                await asyncio.wait_for(pull(service, await spec_for(well, (2,), (2,))), 1)
            with pytest.raises(TransferTimeout):
                await waiting.wait()
        await asyncio.wait_for(waiting.settled(), 20)
        await asyncio.wait_for(pull(service, await spec_for(lost, (3,), (3,))), 10)
