"""Launches a leader and a follower on a Ray cluster it joins, one of them on the node it is told.

Prints what the leader is ready with; then, when all have ended, its exit code and the rooms that are left.
"""

import asyncio
import json
import sys
from dataclasses import replace

from pdserve.cluster.launcher import LaunchSpec, Resources
from pdserve.cluster.ray_launcher import RayLauncher
from pdserve.config.schema import RayConfig
from tests.contract.rooms import rooms


def member(name: str, node: dict[str, float], **payload: object) -> LaunchSpec:
    resources = Resources(cpus=0.1, custom=node)
    return LaunchSpec(name=name, module="tests.contract.launched_program", payload=payload, resources=resources)


async def main(address: str, node_ip: str, token_file: str, placed: str, on: str) -> None:
    def node(name: str) -> dict[str, float]:
        return {f"node:{on}": 0.001} if name == placed else {}

    config = RayConfig(address=address, node_ip=node_ip, auth_token_file=token_file)
    async with RayLauncher(config, cpus=1, engines=1) as launcher:
        follower = member("follower", node("follower"), behaviour="follow")
        leader = member("leader", node("leader"), behaviour="lead", awaited=1)
        launched = await launcher.launch(replace(leader, followers=(follower,)))
        print(json.dumps({**await launched.ready(), "pid": launched.pid}), flush=True)
        print(json.dumps({"code": await launched.ended(), "left": await rooms()}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
