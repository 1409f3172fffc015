"""The public gRPC API over a real channel."""

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.errors import (
    ConfigError,
    EngineDied,
    Overloaded,
    PdserveError,
    RateLimited,
    TransferFailed,
    Unavailable,
)
from pdserve.core.request import Request
from pdserve.gateway.auth import TenantKeys
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.grpc.server import SERVICE, GrpcServer
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import InferenceStub
from tests import tiny_tokenizers as tiny
from tests.scripted_generator import EPOCH, HANG, ScriptedGenerator, Step, speak

SamplingParams = pb.GenerateRequest.SamplingParams
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0))
"""Channel options without which a client's transport takes in megabytes that nobody reads."""

SPOKEN = "the answer: é🙂."


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    generator: ScriptedGenerator
    gateway: Gateway
    server: GrpcServer
    channel: grpc.aio.Channel
    stub: InferenceStub
    fast: FastTokenizer
    leaving: asyncio.Event


@asynccontextmanager
async def grpc_server(directory: Path, settings: GatewaySettings | None = None) -> AsyncIterator[Served]:
    tiny.byte_level(directory)
    fast = FastTokenizer.from_file(str(directory / "tokenizer.json"))
    generator = ScriptedGenerator(speak(fast, SPOKEN))
    gateway = Gateway(generator, Tokenizer.load(directory), tiny.MODEL, settings)
    server, stop, leaving = GrpcServer(gateway, "127.0.0.1", 0), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.serve(stop, 1, leaving))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=SMALL_WINDOW) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            yield Served(
                generator=generator,
                gateway=gateway,
                server=server,
                channel=channel,
                stub=InferenceStub(channel),
                fast=fast,
                leaving=leaving,
            )
    finally:
        stop.set()
        await asyncio.wait_for(serving, 10)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with grpc_server(tmp_path) as running:
        yield running


def hang_after_first(served: Served) -> None:
    whole = served.generator.script

    def script(request: Request) -> list[Step]:
        return [whole(request)[0], HANG]

    served.generator.script = script


async def closed(generator: ScriptedGenerator) -> bool:
    return await asyncio.to_thread(generator.closed.wait, 10)


async def failure(served: Served, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.stub.Generate(request, timeout=10):
            pass
    return caught.value


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata() or ())


async def test_text_in_gives_text_and_token_ids_out(served: Served) -> None:
    call = served.stub.Generate(pb.GenerateRequest(text="the end"), timeout=10)
    responses = [response async for response in call]
    assert "".join(response.text for response in responses) == SPOKEN
    ids = [token for response in responses for token in response.token_ids]
    assert ids == served.fast.encode(SPOKEN).ids
    assert list(served.generator.requests[0].prompt_token_ids) == served.fast.encode("the end").ids
    assert {response.finish_reason for response in responses[:-1]} == {pb.FINISH_REASON_UNSPECIFIED}
    last = responses[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (5, len(ids), 3)
    record = json.loads(last.record_json)
    assert (record["mode"], record["request_id"]) == ("disaggregated", last.request_id)
    assert dict(await call.initial_metadata())["x-request-id"] == last.request_id


async def test_token_ids_and_parameters_reach_the_engines(served: Served) -> None:
    request = pb.GenerateRequest(
        model="tiny",
        token_ids=pb.TokenIds(ids=[5, 6]),
        sampling=SamplingParams(temperature=0, top_k=4, seed=9, max_tokens=30, stop=["wer"], logprobs=True),
    )
    responses = [response async for response in served.stub.Generate(request, timeout=10)]
    assert "".join(response.text for response in responses) == "the ans"
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert [value for response in responses for value in response.logprobs] == [0, -0.5, -1, -1.5, -2]
    (asked,) = served.generator.requests
    assert asked.prompt_token_ids == (5, 6)
    assert (asked.sampling.temperature, asked.sampling.top_k, asked.sampling.seed) == (0, 4, 9)
    assert (asked.sampling.max_tokens, asked.sampling.top_p) == (30, 1)


@pytest.mark.parametrize(
    ("request_", "status", "code", "param"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "invalid_request", "prompt"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "invalid_request", "text"),
        (pb.GenerateRequest(text="x", model="other"), "NOT_FOUND", "model_not_found", None),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[10**6])), "INVALID_ARGUMENT", "invalid_request", "token_ids"),
        (pb.GenerateRequest(text="x" * 600), "INVALID_ARGUMENT", "invalid_request", "text"),
        *(
            (pb.GenerateRequest(text="x", sampling=sampling), "INVALID_ARGUMENT", "invalid_request", name)
            for name, sampling in (
                ("temperature", SamplingParams(temperature=float("nan"))),
                ("temperature", SamplingParams(temperature=float("inf"))),
                ("top_p", SamplingParams(top_p=0)),
                ("max_tokens", SamplingParams(max_tokens=0)),
                ("max_tokens", SamplingParams(max_tokens=2**32 - 1)),
                ("seed", SamplingParams(seed=2**64 - 1)),
                ("min_tokens", SamplingParams(min_tokens=17)),
                ("stop", SamplingParams(stop=[""])),
                ("stop_token_ids", SamplingParams(stop_token_ids=[2**32 - 1])),
            )
        ),
    ],
)
async def test_bad_input_is_refused_and_named(
    served: Served, request_: pb.GenerateRequest, status: str, code: str, param: str | None
) -> None:
    error = await failure(served, request_)
    assert error.code().name == status
    assert trailing(error)["error-code"] == code
    assert trailing(error).get("error-param") == param


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (Overloaded("full", retry_after=2), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("no engine"), grpc.StatusCode.UNAVAILABLE),
        (EngineDied("gone"), grpc.StatusCode.UNAVAILABLE),
        (TransferFailed("torn"), grpc.StatusCode.UNAVAILABLE),
        (PdserveError("odd"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_failure_has_its_status(served: Served, raised: PdserveError, status: grpc.StatusCode) -> None:
    served.generator.script = lambda request: [raised]
    error = await failure(served, pb.GenerateRequest(text="x"))
    assert (error.code(), error.details()) == (status, str(raised))
    assert trailing(error)["error-code"] == raised.code


@pytest.mark.parametrize("begun", [False, True])
async def test_a_rejection_is_what_fails_before_there_is_any_output(served: Served, begun: bool) -> None:
    whole = served.generator.script
    served.generator.script = lambda request: [*(whole(request)[:1] if begun else ()), EngineDied("gone")]
    await failure(served, pb.GenerateRequest(text="x"))
    rejected = served.gateway.metrics.registry.get_sample_value("pdserve_rejections_total", {"reason": "engine_died"})
    assert rejected == (None if begun else 1.0)


@pytest.mark.parametrize(
    ("raised", "seconds"),
    [(Overloaded("full", retry_after=2.5), 2.5), (RateLimited("slower", retry_after=0.2), 0.2), (Unavailable("no"), 1)],
)
async def test_who_may_try_again_is_told_when(served: Served, raised: PdserveError, seconds: float) -> None:
    served.generator.script = lambda request: [raised]
    error = await failure(served, pb.GenerateRequest(text="x"))
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert (status.code, status.message) == (error.code().value[0], str(raised))
    assert status.details[0].Unpack(info)
    assert info.retry_delay.ToNanoseconds() == pytest.approx(seconds * 1e9)


async def test_priority_reaches_the_request_as_far_as_the_tenant_may(tmp_path: Path) -> None:
    digest = sha256(b"sk-tenant").digest()
    settings = GatewaySettings(tenants=(TenantKeys(name="search", digests=(digest,), most_urgent=-2),))
    async with grpc_server(tmp_path, settings) as served:
        for asked in (-9, 3):
            request = pb.GenerateRequest(text="x", priority=asked)
            async for _ in served.stub.Generate(request, metadata=(("authorization", "Bearer sk-tenant"),)):
                pass
        assert [(r.tenant, r.priority) for r in served.generator.requests] == [("search", -2), ("search", 3)]


async def test_defect_tells_nothing(served: Served) -> None:
    served.generator.script = lambda request: [RuntimeError("secret")]
    error = await failure(served, pb.GenerateRequest(text="x"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())


async def test_deadline_of_the_client_becomes_the_requests(served: Served) -> None:
    hang_after_first(served)
    call = served.stub.Generate(pb.GenerateRequest(text="x"), timeout=1.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.generator.requests[0].timeout <= 1.55  # gRPC rounds deadlines up
    assert await closed(served.generator)


async def test_cancelling_the_call_cancels_the_request(served: Served) -> None:
    hang_after_first(served)
    call = served.stub.Generate(pb.GenerateRequest(text="x"), timeout=10)
    assert (await anext(aiter(call))).text == "the"
    assert not served.generator.closed.is_set()
    call.cancel()
    assert await closed(served.generator)


async def test_abort_ends_a_running_request_once(served: Served) -> None:
    hang_after_first(served)
    call = served.stub.Generate(pb.GenerateRequest(text="x"), timeout=10)
    responses = aiter(call)
    request_id = (await anext(responses)).request_id
    assert (await served.stub.GetServerInfo(pb.GetServerInfoRequest())).running_requests == 1
    assert (await served.stub.Abort(pb.AbortRequest(request_id=request_id))).aborted
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(responses)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert await closed(served.generator)
    assert not (await served.stub.Abort(pb.AbortRequest(request_id=request_id))).aborted
    assert not (await served.stub.Abort(pb.AbortRequest(request_id="unknown"))).aborted


async def test_keys_are_needed_and_keep_requests_apart(tmp_path: Path) -> None:
    async with grpc_server(tmp_path, GatewaySettings(api_keys=("sk-one", "sk-two"))) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await failure(served, pb.GenerateRequest(text="x"))).code() is grpc.StatusCode.UNAUTHENTICATED
        hang_after_first(served)
        mine, foreign = (("authorization", "Bearer sk-one"),), (("authorization", "Bearer sk-two"),)
        call = served.stub.Generate(pb.GenerateRequest(text="x"), metadata=mine, timeout=10)
        abort = pb.AbortRequest(request_id=(await anext(aiter(call))).request_id)
        assert not (await served.stub.Abort(abort, metadata=foreign)).aborted
        assert (await served.stub.Abort(abort, metadata=mine)).aborted


async def test_client_that_reads_nothing_is_cut_off(tmp_path: Path) -> None:
    async with grpc_server(tmp_path, GatewaySettings(send_timeout=0.3)) as served:
        line = list(speak(served.fast, "x" * 400, end=None)(Request(id="r", prompt_token_ids=(1,))))
        served.generator.script = lambda request: [*line * 100, HANG]
        call = served.stub.Generate(pb.GenerateRequest(text="x"), timeout=30)
        assert await asyncio.to_thread(served.generator.closed.wait, 15)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call.code()


async def test_model_and_server_are_described(served: Served) -> None:
    model = await served.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.name, model.max_model_len, list(model.eos_token_ids)) == ("tiny", 512, [tiny.IM_END])
    info = await served.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.ready, info.draining, info.running_requests) == (True, False, 0)
    assert [(engine.id, engine.role, engine.epoch) for engine in info.engines] == [
        ("prefill-0", "prefill", EPOCH),
        ("decode-0", "decode", EPOCH),
    ]


async def test_health_follows_readiness(served: Served) -> None:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", SERVICE):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)))
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
    served.gateway.intake.draining = True
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=""))
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    seen = await asyncio.wait_for(anext(watch), 5)
    assert seen.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await failure(served, pb.GenerateRequest(text="x"))).code() is grpc.StatusCode.UNAVAILABLE


async def test_clients_renew_their_connections(tmp_path: Path) -> None:
    async with grpc_server(tmp_path, GatewaySettings(connection_age=0.3)) as served:
        ended = served.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        await asyncio.wait_for(ended, 10)
        assert (await served.stub.GetModelInfo(pb.GetModelInfoRequest())).name == "tiny"


async def test_a_server_that_leaves_takes_no_call_and_lets_those_that_run_end(served: Served) -> None:
    release = threading.Event()
    whole = served.generator.script

    def script(request: Request) -> list[Step]:
        first, *others = whole(request)
        return [first, release, *others]

    served.generator.script = script
    call = served.stub.Generate(pb.GenerateRequest(text="x"), timeout=20)
    messages = aiter(call)
    said = (await anext(messages)).text
    served.leaving.set()
    gone = served.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    await asyncio.wait_for(gone, 10)
    assert (await failure(served, pb.GenerateRequest(text="x"))).code() is grpc.StatusCode.UNAVAILABLE
    release.set()
    async for message in messages:
        said += message.text
    assert said == SPOKEN


async def test_reflection_lists_the_services(served: Served) -> None:
    channel: Any = served.channel
    messages: Any = reflection_pb2
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def ask() -> AsyncIterator[Any]:
        yield messages.ServerReflectionRequest(list_services="")

    answer = await anext(aiter(stub.ServerReflectionInfo(ask())))
    names = {service.name for service in answer.list_services_response.service}
    assert {"pdserve.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_a_client_that_knows_only_reflection_generates(served: Served) -> None:
    script = Path(__file__).parents[2] / "docs" / "tour" / "ask_grpc.py"
    client = await asyncio.create_subprocess_exec(
        sys.executable, str(script), f"127.0.0.1:{served.server.port}", stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(client.communicate(), 30)
    assert (client.returncode, said.decode()) == (0, SPOKEN + "\n")


async def test_port_in_use_is_a_clear_error(served: Served) -> None:
    with pytest.raises(ConfigError, match="in use"):
        GrpcServer(served.gateway, "127.0.0.1", served.server.port)


async def test_a_retry_with_its_idempotency_key_is_answered_without_being_executed(tmp_path: Path) -> None:
    async with grpc_server(tmp_path) as served:
        metadata = (("idempotency-key", "k"),)
        request = pb.GenerateRequest(text="say", sampling=SamplingParams(max_tokens=40))
        first = [response async for response in served.stub.Generate(request, metadata=metadata)]
        call = served.stub.Generate(request, metadata=metadata)
        second = [response async for response in call]
        assert "".join(response.text for response in first) == "".join(response.text for response in second)
        assert second[-1].usage == first[-1].usage
        assert ("idempotent-replayed", "true") in tuple(await call.initial_metadata())
        assert len(served.generator.requests) == 1
        request.sampling.max_tokens = 39
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.stub.Generate(request, metadata=metadata).read()
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
