"""A parent that launches one child, prints the child's pid, and then does nothing until it is killed."""

import asyncio
import sys
from contextlib import AsyncExitStack

from pdserve.cluster.launcher import Launcher, LaunchSpec, Resources
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.cluster.ray_launcher import RayLauncher
from pdserve.config.schema import RayConfig


async def open_launcher(kind: str, held: AsyncExitStack) -> Launcher:
    """The launcher of that name; what it opens is closed with held."""
    if kind == "process":
        return ProcessLauncher()
    return await held.enter_async_context(RayLauncher(RayConfig(), cpus=4, engines=4))


async def main(kind: str) -> None:
    async with AsyncExitStack() as held:
        launcher = await open_launcher(kind, held)
        child = await launcher.launch(
            LaunchSpec(
                name="child",
                module="tests.contract.launched_program",
                payload={"behaviour": "serve"},
                resources=Resources(),
            )
        )
        await child.ready()
        print(child.pid, flush=True)
        await child.ended()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
