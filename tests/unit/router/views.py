"""Engines as a router sees them, for tests of its decisions."""

from pdserve.core.cluster import Booked, ClusterState, EngineView, PrefixHit, RouteAsk, StepModel
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineCapacity, EngineState, LoadSnapshot, Role

BLOCK_SIZE = 16
STEP = StepModel(base=0.002, per_token=1e-4, per_context=1e-7)


def view(
    engine_id: str,
    role: Role,
    *,
    state: EngineState = EngineState.READY,
    backlog: int = 0,
    running: int = 0,
    booked: Booked | None = None,
    leased: int = 0,
    used: int = 0,
    num_blocks: int = 1024,
    max_rows: int = 64,
    draining: bool = False,
    recent_work: float = 0.0,
    step_model: StepModel = STEP,
    epoch: int = 1,
    lost_links: tuple[str, ...] = (),
    max_len: int | None = None,
    numerics: str = "",
    domain: str = "",
    handoff_speeds: dict[str, float] | None = None,
) -> EngineView:
    """An engine whose snapshot has just arrived at second 0; running counts requests of other gateways.
    handoff_speeds: seconds per token, by the source's id."""
    load = LoadSnapshot(
        engine_id=engine_id,
        epoch=epoch,
        number=1,
        running=running,
        waiting=0,
        backlog_tokens=backlog,
        blocks=BlockCounts(total=num_blocks, free=num_blocks - used - leased, used=used, leased=leased, quarantined=0),
        draining=draining,
    )
    return EngineView(
        endpoint=Endpoint(engine_id=engine_id, role=role, epoch=epoch, address="127.0.0.1:1", pid=1, state=state),
        load=load,
        capacity=EngineCapacity(
            model_revision="r1",
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_rows=max_rows,
            max_tokens_per_step=512,
            max_len=max_len,
            numerics=numerics,
            domain=domain,
        ),
        step_model=step_model,
        booked=booked or Booked(),
        others_requests=running,
        recent_work=recent_work,
        lost_links=frozenset((name, 1) for name in lost_links),
        handoff_speeds={(name, 1): speed for name, speed in (handoff_speeds or {}).items()},
    )


def cluster(*views: EngineView, now: float = 0.0) -> ClusterState:
    return ClusterState(now=now, engines=views)


def ask(
    prompt_tokens: int = 500,
    *,
    max_tokens: int = 32,
    excluded: tuple[str, ...] = (),
    parted: tuple[str, ...] = (),
    **cached: int,
) -> RouteAsk:
    """cached: tokens per engine id, of epoch 1."""
    return RouteAsk(
        request_id="r",
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        hits=hits(cached),
        excluded=frozenset((name, 1) for name in excluded),
        parted=frozenset((name, 1) for name in parted),
    )


def hits(cached: dict[str, int]) -> dict[tuple[str, int], PrefixHit]:
    """Tokens per engine id, of epoch 1."""
    return {(name, 1): PrefixHit(tokens=tokens, likely_tokens=tokens) for name, tokens in cached.items()}
