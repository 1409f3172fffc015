"""Long prompts are hashed in another thread; routing them then hashes nothing."""

import threading
from collections.abc import Callable, Sequence

import pytest

from pdserve.core.blocks import KVSnapshot, block_hashes, hash_namespace
from pdserve.core.endpoint import Role
from pdserve.core.request import Request
from pdserve.gateway.hashing import LONG, PromptHasher
from pdserve.router.kv_index import KVIndex
from pdserve.router.policies import KVAware
from pdserve.router.router import Router
from pdserve.router.rules import RoutingRules
from tests.unit.router.views import BLOCK_SIZE, cluster, view

RULES = RoutingRules(decode_local_below=32)
PROMPT = tuple(range(LONG))


def request(request_id: str, num_tokens: int = LONG) -> Request:
    return Request(id=request_id, prompt_token_ids=PROMPT[:num_tokens])


@pytest.fixture
def hashed_in(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads in which prompts were hashed, in turn."""
    threads: list[threading.Thread] = []

    def noted(
        token_ids: Sequence[int], block_size: int, namespace: bytes, give_way: Callable[[], object] | None = None
    ) -> list[bytes]:
        threads.append(threading.current_thread())
        return block_hashes(token_ids, block_size, namespace, give_way)

    monkeypatch.setattr("pdserve.router.router.block_hashes", noted)
    return threads


async def test_a_long_prompt_is_hashed_once_and_not_by_the_event_loop(hashed_in: list[threading.Thread]) -> None:
    index = KVIndex()
    hashes = block_hashes(PROMPT, BLOCK_SIZE, hash_namespace(b"", "r1"))
    index.restore(("p1", 1), KVSnapshot(number=0, hashes=tuple(hashes), first=True, last=True))
    router = Router(KVAware(RULES), index, RULES)
    state = cluster(view("p0", Role.PREFILL), view("p1", Role.PREFILL), view("d0", Role.DECODE))
    router.route(request("first", 40), state)
    hashed_in.clear()
    prepare = PromptHasher(router)
    await prepare(request("long"))
    (thread,) = hashed_in
    assert thread is not threading.current_thread()
    assert router.route(request("long"), state).prefill.engine_id == "p1"
    assert len(hashed_in) == 1
    await prepare(request("short", LONG - 1))
    assert len(hashed_in) == 1


async def test_before_the_first_engine_is_known_nothing_is_prepared(hashed_in: list[threading.Thread]) -> None:
    router = Router(KVAware(RULES), KVIndex(), RULES)
    await PromptHasher(router)(request("long"))
    assert not hashed_in


def test_stretches_are_as_good_as_one_go() -> None:
    pauses: list[None] = []
    namespace = hash_namespace(b"salt", "r1")
    whole = block_hashes(range(1000), 4, namespace)
    assert whole == block_hashes(range(1000), 4, namespace, lambda: pauses.append(None))
    assert (len(whole), len(pauses)) == (250, 4)
    assert block_hashes(range(1002), 4, namespace) == whole
    assert block_hashes(range(3), 4, namespace) == []
    assert whole[:70] == block_hashes(range(280), 4, namespace)
