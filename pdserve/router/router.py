"""The router: looks up what engines hold of a prompt, asks the policy, remembers what it sent where."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import inf

from pdserve.core.blocks import BlockHash, Tier, block_hashes, hash_namespace
from pdserve.core.cluster import (
    BookedDecode,
    ClusterState,
    EngineKey,
    EngineView,
    Mode,
    PrefixHit,
    Route,
    RouteAsk,
    expected_output,
)
from pdserve.core.endpoint import Endpoint, EngineCapacity, LoadSnapshot, Role
from pdserve.core.errors import Unavailable
from pdserve.core.request import Request
from pdserve.router.cost import CostModel
from pdserve.router.directory import Directory, Naming, naming
from pdserve.router.kv_index import BlockHit, KVIndex
from pdserve.router.load import is_full, max_len
from pdserve.router.options import alike, answer_room, find_options, ready_engines
from pdserve.router.policy import RoutingPolicy
from pdserve.router.rebalancing import DecodingRequest, Move, rebalance
from pdserve.router.rules import RoutingRules
from pdserve.router.topology import may_carry

_KEPT_CHAINS = 128

PreparedPrompt = Mapping[Naming, tuple[BlockHash, ...]]
"""A prompt's block hashes, by the way of naming blocks."""


class Router:
    """Routes the requests of one gateway. Hashes of a prompt are computed once and kept for its rebinds."""

    def __init__(self, policy: RoutingPolicy, index: KVIndex, rules: RoutingRules) -> None:
        self._policy = policy
        self._index = index
        self._rules = rules
        self._directory = Directory()
        self._chains: OrderedDict[tuple[str, Naming], tuple[BlockHash, ...]] = OrderedDict()

    @property
    def rebalances(self) -> bool:
        """Whether requests may move to even out load."""
        return self._rules.rebalance

    def ready(self, state: ClusterState) -> bool:
        """Whether a long prompt could be served now."""
        ask = RouteAsk(request_id="", prompt_tokens=self._rules.decode_local_below + 1, max_tokens=1)
        try:
            find_options(ask, state, self._rules)
        except Unavailable:
            return False
        return True

    @property
    def namings(self) -> tuple[Naming, ...]:
        """The ways of naming blocks by which prompts are to be hashed."""
        return tuple(self._directory.namings)

    def prepare(self, request: Request, give_way: Callable[[], object] | None = None) -> PreparedPrompt:
        """Hashes of the request's prompt, to be kept, so that routing it need not make them. For any thread; give_way
        as in block_hashes."""
        return {name: _hashed(request, name, give_way) for name in self.namings}

    def keep(self, request: Request, prepared: PreparedPrompt) -> None:
        """What prepare gave for a request that is to be routed soon."""
        for name, chain in prepared.items():
            self._remember((request.id, name), chain)

    def route(
        self,
        request: Request,
        state: ClusterState,
        excluded: frozenset[EngineKey] = frozenset(),
        parted: frozenset[EngineKey] = frozenset(),
        numerics: str = "",
    ) -> Route:
        """The policy's choice, noted in the index for the engine that computes the prompt: an equal prompt that
        queues behind it will find its KV there. What is fetched counts once it has arrived.

        Raises Unavailable when no engine outside `excluded` may serve the request.
        """
        _, route = self.choose(request, state, excluded, parted, numerics)
        self.expect(request, route, state)
        return route

    def choose(
        self,
        request: Request,
        state: ClusterState,
        excluded: frozenset[EngineKey] = frozenset(),
        parted: frozenset[EngineKey] = frozenset(),
        numerics: str = "",
    ) -> tuple[RouteAsk, Route]:
        """The policy's choice and what it was asked, with nothing noted: the request may not go yet. Raises as route
        does."""
        ask = self._ask(request, state, excluded, parted, numerics)
        return ask, self._policy.choose(ask, state)

    def expect(self, request: Request, route: Route, state: ClusterState) -> None:
        """The request goes this way: note for others what its engine is about to hold."""
        view = self._directory.find(route.prefill.key)
        if view is not None and view.capacity is not None and view.capacity.prefix_caching:
            self._index.expect(view.key, self._chain(request, view.capacity), state.now)

    def retract(self, request: Request, route: Route, since: float) -> None:
        """The request has failed or was cancelled: what was expected of its route, made at that time, and has not been
        announced will not come."""
        for (request_id, _), chain in self._chains.items():
            if request_id == request.id:
                self._index.retract(route.prefill.key, chain, since)

    def rebind(
        self,
        request: Request,
        route: Route,
        state: ClusterState,
        excluded: frozenset[EngineKey] = frozenset(),
        parted: frozenset[EngineKey] = frozenset(),
        numerics: str = "",
    ) -> Route:
        """Look again at the decode engine of a disaggregated route that was booked a while ago.

        The same route, or one with another decode engine: when the first has gone, or when another costs less
        by more than the rules' hysteresis and the policy predicts costs at all. Raises Unavailable when no
        decode engine is left.
        """
        if route.mode is not Mode.DISAGGREGATED:
            return route
        ask = self._ask(request, state, excluded, parted, numerics)
        decodes = {view.key: view for view in ready_engines(ask, state, Role.DECODE)}
        # The current one may have a lost link: then this is the request that tries it.
        current = decodes.pop(route.decode.key, None)
        source = route.prefill.key
        prefill = self._directory.find(source)
        room = answer_room(ask, state)
        others = tuple(
            view
            for key, view in decodes.items()
            if key not in parted and max_len(view) >= room
            if source not in view.lost_links and (prefill is None or may_carry(prefill, view, self._rules))
        )
        others = alike(ask, others) if current is None else tuple(v for v in others if v.numerics == current.numerics)
        if current is None and not others:
            raise Unavailable("no decode engine is ready; try again in a few seconds")
        if prefill is None or not others:
            return route if current else _moved(route, others[0])
        model = CostModel(ask, state.now, self._rules)
        best = min(others, key=lambda view: (model.pair(prefill, view).cost, model.turn(view)))
        if current is not None:
            if route.prediction is None:
                return route
            cost = model.pair(prefill, _without(current, request)).cost
            gain = cost - model.pair(prefill, best).cost
            if gain <= max(self._rules.rebind_gain * cost, self._rules.rebind_seconds):
                return route
        return _moved(route, best)

    def move(self, request: Request, source: EngineKey, state: ClusterState) -> Endpoint:
        """Where a request that decodes on source would best go on, and as far as it might there.

        Raises Unavailable when no other engine can take it."""
        self._directory.follow(state)
        here = self._directory.find(source)
        ask = self._ask(request, state, frozenset({source}), frozenset(), here.numerics if here else "")
        need = ask.prompt_tokens + expected_output(ask.max_tokens)
        longest = min(ask.prompt_tokens + ask.max_tokens, max_len(here) if here else inf)
        able = tuple(
            view
            for role in (Role.DECODE, Role.UNIFIED)
            for view in ready_engines(ask, state, role)
            if not is_full(view, need) and max_len(view) >= longest
            if source not in view.lost_links and (here is None or may_carry(here, view, self._rules))
        )
        if not able:
            raise Unavailable("no other engine has room to go on with what decodes here")
        return CostModel(ask, state.now, self._rules).best_decodes(alike(ask, able), here)[0].endpoint

    def rebalance(
        self, runners: Iterable[DecodingRequest], state: ClusterState, pause: float | None, since: float
    ) -> Move | None:
        """Which of them should move to even out load, and where. pause: what moves took, None before the first."""
        if not self.rebalances:
            return None
        return rebalance(runners, state, self._rules, self._rules.handoff_seconds if pause is None else pause, since)

    def _ask(
        self,
        request: Request,
        state: ClusterState,
        excluded: frozenset[EngineKey],
        parted: frozenset[EngineKey],
        numerics: str,
    ) -> RouteAsk:
        self._directory.follow(state)
        return RouteAsk(
            request_id=request.id,
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            prompt_name=self._name(request),
            hits=self._hits(request, state.now),
            excluded=excluded,
            parted=parted,
            numerics=numerics,
        )

    def _hits(self, request: Request, now: float) -> dict[EngineKey, PrefixHit]:
        """One look along the prompt's chain per way of naming blocks; all engines of a deployment share one."""
        hits: dict[EngineKey, PrefixHit] = {}
        for capacity in self._directory.namings.values():
            found = self._index.match(self._chain(request, capacity), now)
            # Hundreds of engines may hold as much of a prompt as one another.
            known = {hit: _prefix_hit(hit, capacity.block_size) for hit in set(found.values())}
            hits.update(zip(found, map(known.__getitem__, found.values()), strict=True))
            if any(hit.restored_tokens for hit in known.values()):
                hits.update((key, self._restored(key, hit, known[hit])) for key, hit in found.items())
        return hits

    def _restored(self, key: EngineKey, block_hit: BlockHit, hit: PrefixHit) -> PrefixHit:
        view = self._directory.find(key)
        return hit._replace(restore_seconds=_restore_seconds(block_hit, view.load if view else None))

    def _name(self, request: Request) -> bytes:
        """The prompt's last block hash; of a prompt without a block, the request's id."""
        capacity = next(iter(self._directory.namings.values()), None)
        chain = self._chain(request, capacity) if capacity else ()
        return chain[-1] if chain else request.id.encode()

    def _chain(self, request: Request, capacity: EngineCapacity) -> tuple[BlockHash, ...]:
        key = request.id, naming(capacity)
        chain = self._chains.get(key)
        if chain is None:
            chain = _hashed(request, naming(capacity))
            self._remember(key, chain)
        return chain

    def _remember(self, key: tuple[str, Naming], chain: tuple[BlockHash, ...]) -> None:
        self._chains[key] = chain
        while len(self._chains) > _KEPT_CHAINS:
            self._chains.popitem(last=False)


def _hashed(request: Request, name: Naming, give_way: Callable[[], object] | None = None) -> tuple[BlockHash, ...]:
    revision, block_size = name
    namespace = hash_namespace(request.salt, revision)
    return tuple(block_hashes(request.prompt_token_ids, block_size, namespace, give_way))


def _prefix_hit(hit: BlockHit, block_size: int) -> PrefixHit:
    return PrefixHit(
        tokens=hit.blocks * block_size,
        likely_tokens=hit.likely_blocks * block_size,
        restored_tokens=(hit.in_host + hit.in_disk) * block_size,
    )


def _moved(route: Route, decode: EngineView) -> Route:
    old = route.decode.engine_id
    return replace(route, decode=decode.endpoint, reason=f"{route.reason}; decoding moved from {old}")


def _without(view: EngineView, request: Request) -> EngineView:
    """The engine as if this request were not booked there."""
    own = BookedDecode(expected_output(request.sampling.max_tokens), len(request.prompt_token_ids))
    decoding = list(view.booked.decoding)
    if own in decoding:
        decoding.remove(own)
    reserved = max(0, view.booked.reserved_tokens - sum(own))
    return replace(view, booked=replace(view.booked, decoding=tuple(decoding), reserved_tokens=reserved))


def _restore_seconds(hit: BlockHit, load: LoadSnapshot | None) -> float:
    """What the engine has not measured yet counts as nothing: it is then tried."""
    seconds = {tally.tier: tally.seconds_per_block for tally in load.tiers} if load else {}
    return hit.in_host * seconds.get(Tier.HOST, 0.0) + hit.in_disk * seconds.get(Tier.DISK, 0.0)
