"""What other routers have booked on one engine, as they tell."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.core.cluster import BookedDecode, BookedPrompt, Share, expected_output


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """As in core.cluster.Booked."""

    decoding: tuple[BookedDecode, ...] = ()
    reserved_tokens: int = 0
    prefilling: int = 0
    prompts: tuple[BookedPrompt, ...] = ()


NOTHING = Elsewhere()


class OtherBookings:
    """By router and request. since of a prompt is when it was first heard of here (monotonic seconds)."""

    def __init__(self) -> None:
        self._routers: dict[str, dict[str, tuple[Share, float]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._routers.values()))

    def change(self, router: str, request_id: str, share: Share | None, now: float) -> None:
        """None: it is booked no more."""
        known = self._routers.setdefault(router, {})
        before = known.pop(request_id, None)
        if share is not None:
            known[request_id] = share, before[1] if before else now

    def replace(self, router: str, shares: Mapping[str, Share], now: float) -> bool:
        """Whether anything differs."""
        known = self._routers.pop(router, {})
        if shares:
            self._routers[router] = {id: (share, known[id][1] if id in known else now) for id, share in shares.items()}
        return {id: share for id, (share, _) in known.items()} != shares

    def booked(self) -> Elsewhere:
        """All of it together."""
        if not self._routers:
            return NOTHING
        shares = [entry for known in self._routers.values() for entry in known.values()]
        decoding = [share for share, _ in shares if share.prompt_tokens]
        return Elsewhere(
            decoding=tuple(BookedDecode(expected_output(share.left_tokens), share.prompt_tokens) for share in decoding),
            reserved_tokens=sum(share.prompt_tokens + expected_output(share.left_tokens) for share in decoding),
            prefilling=len(shares) - len(decoding),
            prompts=tuple(BookedPrompt(share.uncached_tokens, at) for share, at in shares if share.uncached_tokens),
        )
