"""A parent that launches one child, prints the child's pid, and then does nothing until it is killed."""

import asyncio

from pdserve.cluster.launcher import LaunchSpec
from pdserve.cluster.process_launcher import ProcessLauncher


async def main() -> None:
    spec = LaunchSpec(name="child", module="tests.contract.launched_program", payload={"behaviour": "serve"})
    child = await ProcessLauncher().launch(spec)
    await child.ready()
    print(child.pid, flush=True)
    await child.ended()


if __name__ == "__main__":
    asyncio.run(main())
