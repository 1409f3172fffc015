"""The Inference service."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from typing import Any

import grpc
import orjson
import structlog

from pdserve.core.errors import Cancelled, InvalidRequest, PdserveError
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.gateway.answer import AnswerView
from pdserve.gateway.auth import Identity
from pdserve.gateway.detokenizer import TextDelta
from pdserve.gateway.gateway import Ask, Gateway
from pdserve.gateway.grpc.errors import abort
from pdserve.gateway.keyed import IdempotencyKey, checked_key
from pdserve.rpc.generated.pdserve.v1 import inference_pb2 as pb
from pdserve.rpc.generated.pdserve.v1.inference_pb2_grpc import InferenceServicer

log = structlog.get_logger("pdserve.gateway")

Context = grpc.aio.ServicerContext[Any, Any]
_RENEWED = 1.2
"""Ages of a connection after which its client has another one: 10 % more or less, and a while to hear of it."""
_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class InferenceService(InferenceServicer):
    """The gateway's endpoints over gRPC."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(  # type: ignore[override]  # stubs know iterators only; writing is what lets us time it out
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        identity = await self._identify(context)
        async with self._errors(context) as begun:
            answer = await self._gateway.answer(await self._ask(request, context, identity))
            await context.send_initial_metadata(_initial(answer))
            async with aclosing(answer.deltas()) as deltas:
                async for delta in deltas:
                    await self._write(context, _response(answer, delta))
                    begun.set()
                    answer.sent()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        identity = await self._identify(context)
        async with self._errors(context):
            return pb.AbortResponse(aborted=await self._gateway.abort(request.request_id, identity))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        await self._identify(context)
        model = self._gateway.model
        return pb.GetModelInfoResponse(
            name=model.name,
            revision=model.revision,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.eos_token_ids,
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        await self._identify(context)
        async with self._errors(context):
            overview = await self._gateway.overview()
        engines = [
            pb.GetServerInfoResponse.Engine(
                id=engine.endpoint.engine_id,
                role=engine.endpoint.role.value,
                epoch=engine.endpoint.epoch,
                state=engine.endpoint.state.value,
                running=engine.running,
                waiting=engine.waiting,
            )
            for engine in overview.engines
        ]
        return pb.GetServerInfoResponse(
            version=version("pdserve"),
            ready=self._gateway.ready,
            draining=self._gateway.intake.leaving,
            running_requests=overview.running,
            engines=engines,
            degraded=self._gateway.degraded(),
        )

    async def _identify(self, context: Context) -> Identity:
        self._gateway.intake.hold(context.peer(), _RENEWED * self._gateway.settings.connection_age)
        metadata = dict(context.invocation_metadata() or ())
        header = metadata.get("authorization")
        identity = self._gateway.authenticator.identify(header if isinstance(header, str) else None)
        if identity is None:
            self._gateway.metrics.rejections.labels("invalid_api_key").inc()
            message = "send a valid API key as metadata `authorization: Bearer KEY`"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, message, (("error-code", "invalid_api_key"),))
        assert identity is not None
        return identity

    async def _ask(self, request: pb.GenerateRequest, context: Context, identity: Identity) -> Ask:
        now = self._gateway.clock.unix()
        stamps = [("arrived", now), ("read", now)]
        self._gateway.check_model(request.model)
        prompt = request.WhichOneof("prompt")
        if prompt is None:
            raise InvalidRequest("send a prompt: text or token_ids", "prompt")
        token_ids = await self._gateway.encode(request.text) if prompt == "text" else tuple(request.token_ids.ids)
        stamps.append(("tokenized", self._gateway.clock.unix()))
        metadata = dict(context.invocation_metadata() or ())
        return Ask(
            id=f"gen-{self._gateway.new_id()}",
            endpoint="grpc_generate",
            prompt_token_ids=token_ids,
            prompt_param=prompt,
            sampling=_sampling(request.sampling, self._gateway.settings.sampling_defaults),
            identity=identity,
            priority=request.priority,
            timeout=context.time_remaining(),
            traceparent=str(metadata.get("traceparent", "")),
            stamps=tuple(stamps),
            key=_key(metadata.get("idempotency-key"), identity, request),
        )

    async def _write(self, context: Context, response: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._gateway.settings.send_timeout):
                await context.write(response)
        except TimeoutError:
            raise Cancelled("the client reads nothing") from None

    @asynccontextmanager
    async def _errors(self, context: Context) -> AsyncIterator[asyncio.Event]:
        """Errors as statuses. The event is to be set when there is some output: what fails later is no rejection."""
        begun = asyncio.Event()
        try:
            yield begun
        except PdserveError as error:
            if not begun.is_set():
                self._gateway.metrics.rejections.labels(error.code).inc()
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("unexpected error", method="Generate")
            if not begun.is_set():
                self._gateway.metrics.rejections.labels(PdserveError.code).inc()
            await abort(context, PdserveError("internal error; the server's log has the details"))


def _initial(answer: AnswerView) -> tuple[tuple[str, str], ...]:
    repeated = (("idempotent-replayed", "true"),) if answer.repeated else ()
    return (("x-request-id", answer.request_id), *repeated)


def _response(answer: AnswerView, delta: TextDelta) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=answer.request_id,
        text=delta.text,
        token_ids=[token.id for token in delta.tokens],
        logprobs=[token.logprob for token in delta.tokens if token.logprob is not None],
        finish_reason=_FINISH_REASONS[delta.finish_reason],
    )
    if delta.finish_reason is not None:
        response.usage.prompt_tokens = answer.prompt_tokens
        response.usage.completion_tokens = answer.completion_tokens
        response.usage.cached_tokens = answer.cached_tokens
        response.record_json = orjson.dumps(answer.told()).decode()
    return response


def _key(given: str | bytes | None, identity: Identity, request: pb.GenerateRequest) -> IdempotencyKey | None:
    if given is None:
        return None
    body = request.SerializeToString(deterministic=True)
    return IdempotencyKey.of(checked_key(str(given)), identity, "grpc_generate", body)


def _sampling(given: pb.GenerateRequest.SamplingParams, defaults: Mapping[str, float]) -> SamplingParams:
    """Only fields that are present; the others keep the model's defaults, then those of core."""
    fields: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
        if given.HasField(name)
    }
    return SamplingParams(
        **{**defaults, **fields},
        min_tokens=given.min_tokens,
        stop=tuple(given.stop),
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        logprobs=given.logprobs,
    )
