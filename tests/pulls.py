"""A pull for tests of what becomes of pulls, whatever they are of."""

from pdserve.core.protocols import PullSpec

PULL = PullSpec(
    peer="p",
    epoch=1,
    source_blocks=(1,),
    target_blocks=(2,),
    digest=bytes(16),
    seed=0,
    deadline=30,
    start_within=30,
)
