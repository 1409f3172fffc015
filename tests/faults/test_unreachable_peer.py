"""A peer that cannot be reached when it is connected, as when its line was cut just before: it costs the others
nothing."""

import asyncio

import pytest

from tests.contract.transfer_bench import Bench, Kind, spec_for
from tests.kv_layouts import kv_layout
from tests.namespaces import Hosts, missing

pytestmark = [
    pytest.mark.slow,
    # Over TCP alone: the hosts share a kernel, through which UCX would copy without asking the network.
    pytest.mark.parametrize("kind", [Kind("nixl", {"UCX_TLS": "tcp,self"})], ids=str, indirect=True, scope="module"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(60),
]

LAYOUT = kv_layout(4)


async def test_reads_from_other_peers_go_on_while_one_cannot_be_connected(bench: Bench) -> None:
    with Hosts(("well", "lost", "reader")) as hosts:
        sources = [await bench.doomed_source(LAYOUT, name, hosts.on(name)) for name in ("well", "lost", "reader")]
        well, lost, reader = [source for source, _ in sources]
        await reader.connect(well.address)
        assert await reader.read(await spec_for(well, (0,), (0,))) == ""
        with hosts.cut(("lost", "reader")):
            await asyncio.wait_for(reader.connect(lost.address), 5)
            assert await reader.read(await spec_for(lost, (1,), (1,), deadline=1.5)) == "transfer_timeout"
            for block in (2, 3):
                assert await asyncio.wait_for(reader.read(await spec_for(well, (block,), (block,))), 5) == ""
        async with asyncio.timeout(20):
            while await reader.read(await spec_for(lost, (0,), (0,), deadline=1.5)):
                await reader.connect(lost.address)
