"""POST /v1/chat/completions."""

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from pdserve.core.request import FinishReason
from pdserve.gateway.answer import AnswerView
from pdserve.gateway.detokenizer import OutputToken, TextDelta
from pdserve.gateway.gateway import Ask, Gateway
from pdserve.gateway.http.body import route_class
from pdserve.gateway.http.keys import answer_to, key_of
from pdserve.gateway.http.respond import TextChunk, respond, usage
from pdserve.gateway.http.schemas import ChatBody
from pdserve.gateway.http.urgency import priority_of, timeout_of
from pdserve.gateway.vocabulary import Vocabulary


def chat_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(route_class=route_class(gateway.settings))

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: Request, body: ChatBody) -> Response:
        stamps = [("arrived", request.state.arrived), ("read", gateway.clock.unix())]
        gateway.check_model(body.model)
        prompt = await gateway.encode_chat(body.conversation())
        stamps.append(("tokenized", gateway.clock.unix()))
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if max_tokens is None:
            max_tokens = min(gateway.room(len(prompt), "messages"), gateway.settings.max_chat_tokens)
        include_usage = body.include_usage  # it may refuse: before anything is executed
        ask = Ask(
            id=f"chatcmpl-{request.state.id}",
            endpoint="chat_completions",
            prompt_token_ids=prompt,
            prompt_param="messages",
            sampling=body.sampling(
                max_tokens=max_tokens,
                logprobs=bool(body.logprobs),
                defaults=gateway.settings.sampling_defaults,
            ),
            identity=request.state.identity,
            client_id=request.state.client_id,
            traceparent=request.headers.get("traceparent", ""),
            priority=priority_of(request, body),
            timeout=timeout_of(request, body),
            key=await key_of(request, "chat_completions"),
            stamps=tuple(stamps),
        )
        answer = await answer_to(request, gateway, ask)
        wording = ChatFormat(gateway, answer, logprobs=ask.sampling.logprobs, include_usage=include_usage)
        timeout = gateway.settings.send_timeout
        return await respond(request, answer, wording, stream=bool(body.stream), send_timeout=timeout)

    return router


class ChatFormat:
    """Chunks and body as OpenAI words them, plus the key `pdserve`: the request's record."""

    def __init__(self, gateway: Gateway, answer: AnswerView, *, logprobs: bool, include_usage: bool) -> None:
        self._vocabulary = gateway.tokenizer.vocabulary
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._head = {"id": answer.request_id, "created": answer.created, "model": gateway.model.name}
        self._text_chunk = TextChunk(lambda text: self._chunk({"content": text}))

    def opening(self) -> list[dict[str, object]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunk(self, delta: TextDelta) -> bytes:
        if not self._logprobs:
            return self._text_chunk(delta.text)
        return orjson.dumps(self._chunk({"content": delta.text}, logprobs=self._logprobs_of(delta.tokens)))

    def closing(self, answer: AnswerView, reason: FinishReason) -> list[dict[str, object]]:
        final = self._chunk({}, finish_reason=reason.value) | {"pdserve": answer.told()}
        if not self._include_usage:
            return [final]
        return [final, self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage(answer)}]

    def whole(self, answer: AnswerView, delta: TextDelta) -> dict[str, object]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs_of(delta.tokens),
            "finish_reason": delta.finish_reason,
        }
        return self._head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(answer),
            "pdserve": answer.told(),
        }

    def _chunk(
        self, delta: dict[str, str], *, logprobs: dict[str, object] | None = None, finish_reason: str | None = None
    ) -> dict[str, object]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, object] = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk

    def _logprobs_of(self, tokens: tuple[OutputToken, ...]) -> dict[str, object] | None:
        if not self._logprobs:
            return None
        return {"content": [_token_logprob(self._vocabulary, token) for token in tokens], "refusal": None}


def _token_logprob(vocabulary: Vocabulary, token: OutputToken) -> dict[str, object]:
    spelling = vocabulary.spelling(token.id)
    return {
        "token": spelling.decode(errors="replace"),
        "logprob": token.logprob,
        "bytes": list(spelling),
        "top_logprobs": [],
    }
