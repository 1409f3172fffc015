"""Fronts and their gateway over a real socket: what a client, an operator and Prometheus see is one gateway."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing

import grpc
import pytest

from pdserve.core.admission import Rejection
from pdserve.core.blocks import block_hashes, hash_namespace
from pdserve.core.errors import Cancelled, InvalidRequest, Overloaded, PdserveError, RateLimited, Unavailable
from pdserve.core.request import FinishReason, Request, SamplingParams
from pdserve.core.tasks import running
from pdserve.core.token_delta import TokenDelta
from pdserve.dispatch.tenant_limits import LimitReached
from pdserve.gateway.answer import Answer
from pdserve.gateway.auth import Identity
from pdserve.gateway.detokenizer import TextDelta
from pdserve.gateway.gateway import Ask
from pdserve.gateway.grpc.server import GrpcServer
from pdserve.gateway.hashing import LONG
from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import InferenceStub
from pdserve.shared.claims import Busy, Mine
from tests.fronts import NAMING, Front, Fronted, fronted
from tests.scripted_generator import HANG, ScriptedGenerator, Step

WHO = Identity(salt=b"a salt", tenant="one")


def ask(request_id: str = "r", identity: Identity = WHO, prompt: Sequence[int] = tuple(range(40))) -> Ask:
    return Ask(
        id=request_id,
        endpoint="completions",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=4),
        identity=identity,
        stamps=(("arrived", 1.0),),
    )


def delta(request: Request, index: int, end: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(request_id=request.id, index=index, token_ids=(70 + index,), finish_reason=end)


def three_tokens(request: Request) -> list[Step]:
    return [delta(request, 0), delta(request, 1), delta(request, 2, FinishReason.LENGTH)]


def one_then(then: Step) -> Callable[[Request], list[Step]]:
    return lambda request: [delta(request, 0), then]


async def text(answer: Answer) -> str:
    return "".join([one.text async for one in answer.deltas()])


async def fails(answer: Answer, kind: type[PdserveError]) -> PdserveError:
    with pytest.raises(kind) as caught:
        await text(answer)
    return caught.value


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


async def begun(front: Front, request: Ask) -> "asyncio.Task[str]":
    """A request that has said its first token."""
    first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def read() -> str:
        said: list[TextDelta] = []
        async for one in front.gateway.begin(request).deltas():
            said.append(one)
            if not first.done():
                first.set_result(None)
        return "".join(one.text for one in said)

    reading = asyncio.create_task(read())
    async with asyncio.timeout(10):
        await first
    return reading


async def test_an_answer_and_its_record_are_those_of_one_process() -> None:
    generator = ScriptedGenerator(three_tokens)
    async with fronted(generator) as whole:
        alone, there = whole.gateway.begin(ask()), whole.fronts[0].gateway.begin(ask())
        assert await text(there) == await text(alone) != ""
        assert there.cached_tokens == alone.cached_tokens == 3
        assert there.record.route == alone.record.route
        assert [name for name, _ in there.record.stamps if name != "closed"] == [
            "token_0",
            "token_1",
            "token_2",
            "arrived",
        ]
        told = there.told()
        assert {name: told[name] for name in ("mode", "reason", "prefill")} == {
            name: alone.told()[name] for name in ("mode", "reason", "prefill")
        }
        assert generator.requests[0].salt == generator.requests[1].salt == WHO.salt


async def test_the_gateway_keeps_the_record_with_what_only_the_front_knows() -> None:
    async with fronted(ScriptedGenerator(three_tokens)) as whole:
        answer = whole.fronts[0].gateway.begin(ask())
        async for _ in answer.deltas():
            answer.sent()
        await until(lambda: whole.gateway.ring.find("r").status is not None)  # type: ignore[union-attr]
        record = whole.gateway.ring.find("r")
        assert record is not None
        assert (record.status, record.finish_reason, record.output_tokens) == ("ok", "length", 3)
        assert "first_sent" in dict(record.stamps)


@pytest.mark.parametrize("long", [False, True])
async def test_prompts_are_hashed_by_the_front(long: bool) -> None:
    prompt = tuple(token % 200 for token in range(LONG if long else 40))
    async with fronted(ScriptedGenerator(three_tokens)) as whole:
        request = Request(id="r", prompt_token_ids=prompt, salt=b"s")
        async with aclosing(whole.fronts[0].line.generate(request, whole.gateway.begin(ask()).record)) as deltas:
            assert [one async for one in deltas]
        revision, block_size = NAMING
        wanted = block_hashes(prompt, block_size, hash_namespace(b"s", revision))
        assert whole.routes.kept["r"] == {NAMING: tuple(wanted)}


async def test_errors_arrive_whole() -> None:
    errors = [
        Overloaded("later", 7.5),
        RateLimited("your limit", 3.0),
        InvalidRequest("no", "stop"),
        Unavailable("none"),
    ]
    async with fronted(ScriptedGenerator(one_then(""))) as whole:
        for error in errors:
            whole.gateway.generator.script = one_then(error)  # type: ignore[attr-defined]
            seen = await fails(whole.fronts[0].gateway.begin(ask()), type(error))
            assert (type(seen), str(seen), vars(seen)) == (type(error), str(error), vars(error))
        whole.gateway.generator.script = one_then(RuntimeError("a secret"))  # type: ignore[attr-defined]
        assert "secret" not in str(await fails(whole.fronts[0].gateway.begin(ask()), PdserveError))


async def test_an_error_without_a_code_of_its_own_arrives_as_the_one_it_has_it_from() -> None:
    error = LimitReached("two at a time", 3.0, Rejection.CONCURRENCY)
    async with fronted(ScriptedGenerator(one_then(error))) as whole:
        seen = await fails(whole.fronts[0].gateway.begin(ask()), RateLimited)
        assert (type(seen), str(seen), vars(seen)) == (RateLimited, str(error), {"retry_after": 3.0})


async def test_a_client_that_leaves_ends_its_request_at_the_gateway_and_the_front_hears_what_it_took() -> None:
    generator = ScriptedGenerator(one_then(HANG))
    async with fronted(generator) as whole:
        answer = whole.fronts[0].gateway.begin(ask())
        async with aclosing(answer.deltas()) as deltas:
            await anext(deltas)
        assert generator.closed.is_set()
        assert answer.record.status == Cancelled.code
        assert answer.record.route is not None
        assert len(whole.gateway.intake) == 0


async def test_a_request_is_aborted_from_any_front_by_its_owner_alone() -> None:
    async with fronted(ScriptedGenerator(one_then(HANG)), 2) as whole:
        one, other = (front.gateway for front in whole.fronts)
        reading = await begun(whole.fronts[0], ask())
        assert not await other.abort("r", Identity(salt=b"", tenant="another"))
        assert not await other.abort("s", WHO)
        assert (await other.overview()).running == 1
        assert await other.abort("r", WHO)
        with pytest.raises(Cancelled, match="aborted"):
            await reading
        assert len(one.intake) == 0


async def test_what_a_gateway_cuts_off_as_it_ends_hears_that_another_will_answer() -> None:
    async with fronted(ScriptedGenerator(one_then(HANG)), 1) as whole:
        reading = await begun(whole.fronts[0], ask())
        assert not await whole.gateway.intake.drained(0.01)
        with pytest.raises(Unavailable, match="another one will answer"):
            await reading


async def test_grpc_is_shared_by_fronts_and_any_connection_sees_and_aborts_a_request() -> None:
    alone = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, which the kernel gives to either front
    async with fronted(ScriptedGenerator(one_then(HANG)), 2) as whole, AsyncExitStack() as stack:
        first = GrpcServer(whole.fronts[0].gateway, "127.0.0.1", 0, shared=True)
        second = GrpcServer(whole.fronts[1].gateway, "127.0.0.1", first.port, shared=True)
        stop = asyncio.Event()
        await stack.enter_async_context(running(first.serve(stop, 1), second.serve(stop, 1)))
        stack.callback(stop.set)
        address = f"127.0.0.1:{first.port}"
        channels = [grpc.aio.insecure_channel(address, options=alone) for _ in range(12)]
        stubs = [InferenceStub(await stack.enter_async_context(channel)) for channel in channels]
        answer = aiter(stubs[0].Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=(1, 2, 3))), timeout=20))
        request_id = (await anext(answer)).request_id
        infos = [await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10) for stub in stubs]
        assert {(info.ready, len(info.engines), info.running_requests) for info in infos} == {(True, 2, 1)}
        assert (await stubs[-1].Abort(pb.AbortRequest(request_id=request_id), timeout=10)).aborted
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await anext(answer)
        assert ended.value.code() is grpc.StatusCode.CANCELLED


async def test_a_lost_front_leaves_nothing_behind_and_others_go_on() -> None:
    generator = ScriptedGenerator(one_then(HANG))
    async with fronted(generator, 2) as whole:
        dying, living = whole.fronts
        lost, stays = await begun(dying, ask("lost")), await begun(living, ask("stays"))
        assert await dying.claims.claim("key", "lost", b"body") == Mine()
        await dying.claims.release("key", "not its owner")
        assert isinstance(await living.claims.claim("key", "stays", b"body"), Busy)
        kill(dying)
        await until(lambda: len(whole.gateway.intake) == 1)
        with pytest.raises(Unavailable, match="starts again"):
            await lost
        assert await living.claims.claim("key", "stays", b"body") == Mine()
        record = whole.gateway.ring.find("lost")
        assert record is not None
        assert record.status == Cancelled.code
        assert await whole.metric('pdserve_requests_total{endpoint="completions",status="cancelled"}') == 1
        assert not stays.done()
        stays.cancel()


async def test_a_client_that_leaves_while_it_claims_holds_no_claim() -> None:
    async with fronted(ScriptedGenerator(three_tokens)) as whole:
        [front] = whole.fronts
        claiming = asyncio.create_task(front.claims.claim("key", "gone", b"body"))
        await asyncio.sleep(0)
        claiming.cancel()
        async with asyncio.timeout(10):
            while isinstance(await front.claims.claim("key", "next", b"body"), Busy):
                await front.claims.changed("key", 0.05)


async def test_without_its_gateway_a_front_is_not_ready_and_refuses_until_the_next_one_is_there() -> None:
    async with fronted(ScriptedGenerator(one_then(HANG))) as whole:
        [front] = whole.fronts
        assert front.gateway.ready
        reading = await begun(front, ask())
        await whole.hub.close()
        with pytest.raises(Unavailable, match="starts again"):
            await reading
        assert not front.gateway.ready
        await fails(front.gateway.begin(ask()), Unavailable)
        with pytest.raises(Unavailable):
            await front.claims.claim("key", "r", b"body")
        assert not whole.gateway.intake
        await whole.hub.listen(whole.path)
        await until(lambda: front.gateway.ready)


async def test_fronts_are_told_at_once_that_the_gateway_drains() -> None:
    async with fronted(ScriptedGenerator(one_then(HANG)), 2) as whole:
        reading = await begun(whole.fronts[0], ask())
        whole.gateway.intake.draining = True
        whole.hub.tell_state()
        await until(lambda: not any(front.gateway.ready for front in whole.fronts))
        await fails(whole.fronts[1].gateway.begin(ask("late")), Unavailable)
        assert not reading.done()
        reading.cancel()


async def test_metrics_add_up_and_never_go_back() -> None:
    async with fronted(ScriptedGenerator(three_tokens), 2) as whole:
        for number, front in enumerate(whole.fronts, 1):
            for _ in range(number):
                await text(front.gateway.begin(ask()))
        whole.fronts[0].gateway.metrics.rejections.labels("invalid_api_key").inc()
        await assert_counted(whole, requests=3)
        kill(whole.fronts[1])
        await until(lambda: whole.hub.num_fronts == 1)
        await assert_counted(whole, requests=3)
        await until(lambda: whole.fronts[1].gateway.ready)
        await text(whole.fronts[1].gateway.begin(ask()))
        await assert_counted(whole, requests=4)


async def assert_counted(whole: Fronted, requests: int) -> None:
    assert await whole.metric('pdserve_requests_total{endpoint="completions",status="ok"}') == requests
    assert await whole.metric("pdserve_output_tokens_total") == 3 * requests
    assert await whole.metric("pdserve_time_to_first_token_seconds_count") == requests
    assert await whole.metric('pdserve_time_to_first_token_seconds_bucket{le="+Inf"}') == requests
    assert await whole.metric('pdserve_engine_running_sequences{engine="prefill-0"}') == 2


async def test_tokens_wait_in_the_front_for_a_slow_reader_and_become_one() -> None:
    script = [TokenDelta(request_id="r", index=index, token_ids=(70,)) for index in range(50)]
    last = TokenDelta(request_id="r", index=50, token_ids=(71,), finish_reason=FinishReason.LENGTH)
    generator = ScriptedGenerator(lambda request: [*script, last])
    async with fronted(generator) as whole:
        request = Request(id="r", prompt_token_ids=(1, 2))
        async with aclosing(whole.fronts[0].line.generate(request, whole.gateway.begin(ask()).record)) as deltas:
            first = await anext(deltas)
            assert generator.closed.wait(0) or await asyncio.to_thread(generator.closed.wait, 10)
            await asyncio.sleep(0.05)
            rest = [one async for one in deltas]
        assert len(rest) < 10
        assert sum(len(one.token_ids) for one in (first, *rest)) == 51


def kill(front: Front) -> None:
    """Its end of the line breaks, as when its process is killed."""
    line = front.line._line
    assert line is not None
    assert line._transport is not None
    line._transport.abort()
