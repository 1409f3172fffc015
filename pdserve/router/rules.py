"""What an operator may set about routing, as the router sees it."""

from dataclasses import dataclass
from typing import Literal

from pdserve.core.endpoint import LEASED_WATERMARK


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """Bounds and weights of route choice.

    decode_local_below: a prompt with fewer uncached tokens on a decode engine is computed there, where one
    step costs less than a handoff. fallback: one pool may do everything while the other has no engine, or
    while every decode engine is full. leased_watermark: a prefill engine with this share of its blocks
    leased gets new prompts only when all others have too.

    cost = ttft_weight · TTFT + gap_weight · handoff gap + tpot_weight · TPOT · expected output
    + (evict_weight · filled share of KV + spread_weight · recent utilisation) · own compute, in seconds (router.cost).
    The last term is for the others: computing what lies in a cache elsewhere makes them wait, the likelier the busier
    the engine; and takes the place of their KV, once the engine's is full.
    local_advantage: a short prompt stays on its decode engine unless a pair costs this many times less.
    handoff_seconds and fetch_seconds_per_token price a handoff. fetch: an engine may fetch a prompt's beginning from
    another's cache where that is predicted to be sooner there than computed; where no fetch was measured,
    fetch_seconds_per_token prices it, and the gain must exceed the price by this share (fetch_margin) of it.
    topology: "required" lets no KV leave its domain. Otherwise moving it to another one is thought to take far_factor
    times as long where nobody has measured it, and each second that takes longer than within a domain costs far_weight,
    also while it hides behind computing: others share that network.
    rebind_gain: a reserved decode engine is left only for one whose cost is lower by this share of it and by
    rebind_seconds. rebalance: what decodes may move to even out load (router.rebalancing), away from an engine whose
    pressure is rebalance_apart times another's; KV beyond the share rebalance_kv of it presses. The move must save more
    than it costs by this share of that (rebalance_margin) and by rebalance_seconds.
    pool_top: pairs are formed of so many of the best engines of each pool.
    """

    decode_local_below: int = 32
    fallback: bool = True
    leased_watermark: float = LEASED_WATERMARK
    ttft_weight: float = 1.0
    gap_weight: float = 1.0
    tpot_weight: float = 1.0
    evict_weight: float = 4.0
    spread_weight: float = 0.5
    local_advantage: float = 1.5
    handoff_seconds: float = 0.005
    fetch_seconds_per_token: float = 2e-6
    topology: Literal["preferred", "required"] = "preferred"
    far_factor: float = 4.0
    far_weight: float = 0.5
    fetch: bool = True
    fetch_margin: float = 0.25
    rebind_gain: float = 0.2
    rebind_seconds: float = 0.02
    rebalance: bool = False
    rebalance_apart: float = 1.25
    rebalance_kv: float = 0.9
    rebalance_margin: float = 1.0
    rebalance_seconds: float = 0.1
    pool_top: int = 4
    max_alternatives: int = 8
