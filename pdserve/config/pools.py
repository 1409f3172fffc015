"""The configuration's pools: how many engines of a role there are, and what each takes on."""

from typing import Annotated, Literal

from pydantic import Field

from pdserve.config.section import NonEmpty, Positive, Section
from pdserve.core.endpoint import EngineLimits, Role


class PlacementConfig(Section):
    """What each engine takes of the Ray node it is placed on, or of each of its nodes; the process launcher has no use
    for it."""

    cpus: Annotated[float, Field(ge=0)] | None = None
    """By default one for each rank that is there."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """A fraction lets engines share a GPU. By default none on cpu, otherwise a fair share of what there is."""
    resources: dict[NonEmpty, Annotated[float, Field(gt=0)]] = Field(default={})
    """Names of your own that nodes offer, for engines to be placed only there."""


class PoolConfig(Section):
    """How many engines of a role there are, and how much each takes on. Fields as in EngineLimits."""

    engines: Annotated[int, Field(ge=0, le=512)]
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks that compute each engine's model together, each in a process of its own; pools may differ."""
    hosts: Annotated[int, Field(ge=1, le=16)] = 1
    """Machines, or pods, that each engine's ranks are spread over, as many on each; with 1 they share one."""
    max_tokens_per_step: Positive
    max_rows: Positive
    chunk_size: Positive
    accepts_handoff: bool
    prefix_caching: bool = True
    depth: Literal[1, 2] = 2
    domain: NonEmpty | tuple[NonEmpty, ...] | None = None
    """Name of the fast network the engines are on, such as a rack or an NVLink switch; or several, which they have in
    turn: prefill-0 the first, prefill-1 the second. PDSERVE_DOMAIN in an engine's environment comes before this."""
    placement: PlacementConfig = PlacementConfig()

    @property
    def cpus(self) -> float:
        """Of each Ray node it is on, for each engine."""
        return self.tensor_parallel // self.hosts if self.placement.cpus is None else self.placement.cpus

    def limits(self, max_model_len: int) -> EngineLimits:
        """max_model_len in tokens, prompt and answer together."""
        return EngineLimits(
            max_model_len=max_model_len,
            **self.model_dump(exclude={"engines", "tensor_parallel", "hosts", "domain", "placement"}),
        )

    def domain_of(self, number: int) -> str:
        """Of the engine of that number, as far as this says; empty if it does not."""
        if isinstance(self.domain, tuple):
            return self.domain[number % len(self.domain)] if self.domain else ""
        return self.domain or ""


class PrefillPool(PoolConfig):
    """Reads prompts: large steps, few sequences."""

    engines: Annotated[int, Field(ge=0, le=512)] = 1
    max_tokens_per_step: Positive = 1024
    max_rows: Positive = 16
    chunk_size: Positive = 256
    accepts_handoff: bool = False


class DecodePool(PoolConfig):
    """Writes tokens: many sequences, and small chunks for the short prompts it reads by itself."""

    engines: Annotated[int, Field(ge=0, le=512)] = 1
    max_tokens_per_step: Positive = 256
    max_rows: Positive = 64
    chunk_size: Positive = 128
    accepts_handoff: bool = True


class UnifiedPool(PoolConfig):
    """Does both, without handoffs: the baseline disaggregation is compared with."""

    engines: Annotated[int, Field(ge=0, le=512)] = 0
    max_tokens_per_step: Positive = 512
    max_rows: Positive = 32
    chunk_size: Positive = 256
    accepts_handoff: bool = True


class PoolsConfig(Section):
    prefill: PrefillPool = PrefillPool()
    decode: DecodePool = DecodePool()
    unified: UnifiedPool = UnifiedPool()

    def by_role(self) -> dict[Role, PoolConfig]:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.UNIFIED: self.unified}
