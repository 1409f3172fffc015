"""A stable choice between equals: by what is asked, not by chance or by what is left of earlier load."""

from blake3 import blake3


def rendezvous(name: bytes, engine_id: str) -> bytes:
    """Of several engines the one with the least of these takes what is called name.

    Every gateway and the simulator choose alike; when an engine leaves, only what it had moves (highest random weight
    hashing, Thaler and Ravishankar 1998)."""
    return blake3(name + b"|" + engine_id.encode()).digest(8)
