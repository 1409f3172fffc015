"""Blocks of an engine that nobody needs now, lent to a check of the transfers."""

from collections.abc import Callable

from pdserve.core.errors import EngineDied, Unavailable
from pdserve.kvcache.manager import KVCacheManager


class SpareBlocks:
    """died: the engine's end, if it has come; on_free is called when blocks are free again."""

    def __init__(
        self,
        engine_id: str,
        kv: KVCacheManager,
        *,
        died: Callable[[], EngineDied | None],
        on_free: Callable[[], None],
    ) -> None:
        self._engine_id = engine_id
        self._kv = kv
        self._died = died
        self._on_free = on_free

    def borrow(self, most: int) -> tuple[int, ...]:
        """At most so many. Raises Unavailable when there are none."""
        if died := self._died():
            raise died
        blocks = self._kv.borrow(most)
        if not blocks:
            raise Unavailable(f"{self._engine_id} has no spare KV blocks now")
        return blocks

    def quarantine(self, blocks: tuple[int, ...]) -> None:
        """A transfer may still write into these borrowed blocks; they are given back when it no longer does."""
        self._kv.quarantine(blocks)

    def give_back(self, blocks: tuple[int, ...], *, quarantined: bool = False) -> None:
        if quarantined:
            self._kv.unquarantine(blocks)
        self._kv.give_back(blocks)
        self._on_free()
