"""Which ways a request may go at all; which of them is best is a policy's business."""

from dataclasses import dataclass

from pdserve.core.cluster import ClusterState, EngineView, Mode, RouteAsk, expected_output
from pdserve.core.endpoint import EngineState, Role
from pdserve.core.errors import Unavailable
from pdserve.router.load import is_full, leased_share
from pdserve.router.rules import RoutingRules


@dataclass(frozen=True, slots=True)
class LocalOption:
    """One engine does prompt and tokens. short: the prompt has so little left to compute there that this is
    preferred to a handoff."""

    view: EngineView
    mode: Mode
    reason: str
    short: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """Every prefill engine may go with every decode engine; pairs is False when one pool is empty."""

    prefills: tuple[EngineView, ...]
    decodes: tuple[EngineView, ...]
    local: tuple[LocalOption, ...]

    @property
    def pairs(self) -> bool:
        return bool(self.prefills and self.decodes)


def ready_engines(ask: RouteAsk, state: ClusterState, role: Role) -> tuple[EngineView, ...]:
    """Engines of a role that may get the request, in the order of their ids."""
    ready = (
        view
        for view in state.engines
        if view.endpoint.role is role
        and view.endpoint.state is EngineState.READY
        and not (view.load and view.load.draining)
        and view.key not in ask.excluded
    )
    return tuple(sorted(ready, key=lambda view: view.endpoint.engine_id))


def find_options(ask: RouteAsk, state: ClusterState, rules: RoutingRules) -> Options:
    """Raises Unavailable naming the pool that has no engine when nothing else is allowed."""
    prefills = _below_watermark(ready_engines(ask, state, Role.PREFILL), rules)
    decodes = ready_engines(ask, state, Role.DECODE)
    local = [
        LocalOption(view, Mode.DECODE_LOCAL, "this engine does prompts and tokens")
        for view in ready_engines(ask, state, Role.UNIFIED)
    ]
    local += _short(ask, decodes, rules)
    if rules.fallback:
        local += _fallback(ask, prefills, decodes, rules)
    options = Options(prefills, decodes, tuple(local))
    if not options.pairs and not local:
        missing = "prefill" if decodes else "decode"
        raise Unavailable(f"no {missing} engine is ready; try again in a few seconds")
    return options


def _below_watermark(prefills: tuple[EngineView, ...], rules: RoutingRules) -> tuple[EngineView, ...]:
    return tuple(view for view in prefills if leased_share(view) < rules.leased_watermark) or prefills


def _short(ask: RouteAsk, decodes: tuple[EngineView, ...], rules: RoutingRules) -> list[LocalOption]:
    below = rules.decode_local_below
    return [
        LocalOption(
            view, Mode.DECODE_LOCAL, f"{ask.uncached(view.key)} uncached tokens are fewer than {below}", short=True
        )
        for view in decodes
        if ask.uncached(view.key) < below
    ]


def _fallback(
    ask: RouteAsk, prefills: tuple[EngineView, ...], decodes: tuple[EngineView, ...], rules: RoutingRules
) -> list[LocalOption]:
    if not prefills:
        short = rules.decode_local_below
        return [
            LocalOption(view, Mode.DECODE_LOCAL, "no prefill engine is ready")
            for view in decodes
            if ask.uncached(view.key) >= short
        ]
    if not decodes:
        return [LocalOption(view, Mode.PREFILL_LOCAL, "no decode engine is ready") for view in prefills]
    more = ask.prompt_tokens + expected_output(ask.max_tokens)
    if all(is_full(view, more) for view in decodes):
        return [LocalOption(view, Mode.PREFILL_LOCAL, "every decode engine is full") for view in prefills]
    return []
