"""Simulated engines: the real Engine over a SimExecutor and a SimTransfer, in a Node."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from pdserve.config.times import Times
from pdserve.core.clock import Clock
from pdserve.core.endpoint import Endpoint, EngineCapacity, EngineLimits, EngineState, Role
from pdserve.core.errors import LinkLost, PdserveError
from pdserve.core.layout import KVLayout
from pdserve.core.protocols import ModelInfo, PeerAddress, RankAddress
from pdserve.core.shards import sole_shard
from pdserve.engine.engine import Engine
from pdserve.engine.source_link import SourceName
from pdserve.simulator.executor import SimExecutor
from pdserve.simulator.link import SimLink
from pdserve.simulator.node import Node
from pdserve.simulator.profile import Profile
from pdserve.simulator.transfer import BACKEND, Port, SimTransfer

VOCAB_SIZE = 2**31 - 1
"""Ample, so that a prompt's token ids can be the hash ids of a trace."""


@dataclass(frozen=True, slots=True)
class SimEngine:
    """One incarnation."""

    endpoint: Endpoint
    node: Node
    engine: Engine
    executor: SimExecutor
    transfer: SimTransfer

    @property
    def capacity(self) -> EngineCapacity:
        return EngineCapacity(
            model_revision=self.engine.info.revision,
            block_size=self.transfer.layout.block_size,
            num_blocks=self.transfer.layout.num_blocks,
            max_rows=self.engine.limits.max_rows,
            max_tokens_per_step=self.engine.limits.max_tokens_per_step,
            prefix_caching=self.engine.limits.prefix_caching,
            max_len=self.engine.max_len,
            domain=self.engine.domain,
        )

    @property
    def key(self) -> tuple[str, int]:
        return self.endpoint.key


class EngineFactory:
    """Builds engines of one profile that can reach each other, also those of earlier incarnations' tickets."""

    def __init__(self, profile: Profile, layout: KVLayout, times: Times, clock: Clock, depth: int) -> None:
        self.profile = profile
        self.layout = layout
        self.times = times
        self._clock = clock
        self._depth = depth
        self._fabric: dict[tuple[str, int], Port] = {}
        self.incarnations: dict[tuple[str, int], SimEngine] = {}

    def build(self, engine_id: str, role: Role, epoch: int) -> SimEngine:
        node = Node(self._clock)
        endpoint = Endpoint(
            engine_id=engine_id, role=role, epoch=epoch, address=engine_id, pid=0, state=EngineState.READY
        )
        pool = self.profile.pools.by_role()[role]
        domain = pool.domain_of(int(engine_id.rpartition("-")[2]))
        self._fabric[engine_id, epoch] = Port(node, domain)
        address = PeerAddress(
            engine_id=engine_id,
            epoch=epoch,
            layout_hash=self.layout.wire_hash,
            ranks=(RankAddress(shard=sole_shard(self.layout), backends=((BACKEND, b""),)),),
        )
        transfer = SimTransfer(self.layout, address, self.profile.links, self._fabric, node.clock)
        executor = SimExecutor(self.profile.step_cost(role), VOCAB_SIZE, node.clock, Random(epoch))
        engine = Engine(
            endpoint=endpoint,
            info=model_info(self.profile),
            limits=self._limits(role),
            executor=executor,
            transfer=transfer,
            open_link=partial(self._open_link, node, transfer),
            times=self.times,
            clock=node.clock,
            domain=domain,
        )
        built = SimEngine(endpoint, node, engine, executor, transfer)
        self.incarnations[built.key] = built
        return built

    def flip(self, engine: SimEngine, role: Role) -> None:
        engine.engine.become(role, self._limits(role))
        engine.executor.cost = self.profile.step_cost(role)

    def _limits(self, role: Role) -> EngineLimits:
        pool = self.profile.pools.by_role()[role].model_copy(update={"depth": self._depth})
        return pool.limits(self.profile.max_model_len)

    def _open_link(
        self, node: Node, transfer: SimTransfer, name: SourceName, on_failure: Callable[[PdserveError], None]
    ) -> SimLink:
        source = self.incarnations.get((name.engine_id, name.epoch))
        if source is None:
            raise LinkLost(f"{name.engine_id} has never been heard of")
        return SimLink(
            here=(node, transfer),
            there=(source.node, source.engine, source.transfer.address),
            times=self.times,
            latency=self.profile.links.latency,
            on_failure=on_failure,
        )


def model_info(profile: Profile) -> ModelInfo:
    """No token ends a sequence: a trace says how long each answer is."""
    return ModelInfo(
        name=profile.name,
        revision=profile.name,
        vocab_size=VOCAB_SIZE,
        max_model_len=profile.max_model_len,
        eos_token_ids=(),
    )


async def shut_down(engine: SimEngine) -> None:
    """End the engine's tasks; a dead node's engine is taken down without anybody hearing of it."""
    await engine.engine.__aexit__(None, None, None)
