"""What is taken of a Ray cluster."""

import asyncio
import sys


async def rooms() -> list[str]:
    """Ray's placement groups that are not given back."""
    if "ray" not in sys.modules:  # it must not be imported before its environment is set
        return []
    import ray
    from ray.util import placement_group_table

    if not ray.is_initialized():
        return []
    groups = await asyncio.to_thread(placement_group_table)
    return [group["name"] for group in groups.values() if group["state"] != "REMOVED"]
