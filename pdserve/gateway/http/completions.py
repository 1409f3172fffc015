"""POST /v1/completions."""

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from pdserve.core.errors import Unsupported
from pdserve.core.request import FinishReason
from pdserve.gateway.answer import AnswerView
from pdserve.gateway.detokenizer import OutputToken, TextDelta
from pdserve.gateway.gateway import Ask, Gateway
from pdserve.gateway.http.body import route_class
from pdserve.gateway.http.keys import answer_to, key_of
from pdserve.gateway.http.respond import TextChunk, respond, usage
from pdserve.gateway.http.schemas import CompletionBody
from pdserve.gateway.http.urgency import priority_of, timeout_of

DEFAULT_MAX_TOKENS = 16


def completions_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(route_class=route_class(gateway.settings))

    @router.post("/v1/completions", response_model=None)
    async def create_completion(request: Request, body: CompletionBody) -> Response:
        stamps = [("arrived", request.state.arrived), ("read", gateway.clock.unix())]
        gateway.check_model(body.model)
        if body.logprobs:
            raise Unsupported("only logprobs: 0 (those of the chosen tokens) is supported", "logprobs")
        prompt = body.one_prompt()
        token_ids = await gateway.encode(prompt) if isinstance(prompt, str) else prompt
        stamps.append(("tokenized", gateway.clock.unix()))
        include_usage = body.include_usage  # it may refuse: before anything is executed
        ask = Ask(
            id=f"cmpl-{request.state.id}",
            endpoint="completions",
            prompt_token_ids=token_ids,
            sampling=body.sampling(
                max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                logprobs=body.logprobs is not None,
                defaults=gateway.settings.sampling_defaults,
            ),
            identity=request.state.identity,
            client_id=request.state.client_id,
            traceparent=request.headers.get("traceparent", ""),
            priority=priority_of(request, body),
            timeout=timeout_of(request, body),
            key=await key_of(request, "completions"),
            stamps=tuple(stamps),
        )
        answer = await answer_to(request, gateway, ask)
        wording = CompletionFormat(gateway, answer, logprobs=ask.sampling.logprobs, include_usage=include_usage)
        timeout = gateway.settings.send_timeout
        return await respond(request, answer, wording, stream=bool(body.stream), send_timeout=timeout)

    return router


class CompletionFormat:
    """Chunks and body as OpenAI words them, plus the key `pdserve`: the request's record."""

    def __init__(self, gateway: Gateway, answer: AnswerView, *, logprobs: bool, include_usage: bool) -> None:
        self._vocabulary = gateway.tokenizer.vocabulary
        self._include_usage = include_usage
        self._logprobs = logprobs
        self._text_offset = 0
        self._head = {
            "id": answer.request_id,
            "object": "text_completion",
            "created": answer.created,
            "model": gateway.model.name,
        }
        self._text_chunk = TextChunk(lambda text: self._body(self._choice(text, (), None)))

    def opening(self) -> list[dict[str, object]]:
        return []

    def chunk(self, delta: TextDelta) -> bytes:
        if not self._logprobs:
            return self._text_chunk(delta.text)
        return orjson.dumps(self._body(self._choice(delta.text, delta.tokens, None)))

    def closing(self, answer: AnswerView, reason: FinishReason) -> list[dict[str, object]]:
        final = self._body(self._choice("", (), reason)) | {"pdserve": answer.told()}
        if not self._include_usage:
            return [final]
        return [final, self._head | {"choices": [], "usage": usage(answer)}]

    def whole(self, answer: AnswerView, delta: TextDelta) -> dict[str, object]:
        choice = self._choice(delta.text, delta.tokens, delta.finish_reason)
        return self._head | {"choices": [choice], "usage": usage(answer), "pdserve": answer.told()}

    def _body(self, choice: dict[str, object]) -> dict[str, object]:
        body: dict[str, object] = self._head | {"choices": [choice]}
        return body | {"usage": None} if self._include_usage else body

    def _choice(
        self, text: str, tokens: tuple[OutputToken, ...], finish_reason: FinishReason | None
    ) -> dict[str, object]:
        logprobs = self._logprobs_of(tokens) if self._logprobs else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs_of(self, tokens: tuple[OutputToken, ...]) -> dict[str, object]:
        """text_offset counts the characters of the tokens before, from the start of the completion."""
        spellings, offsets = [], []
        for token in tokens:
            spellings.append(self._vocabulary.spelling(token.id).decode(errors="replace"))
            offsets.append(self._text_offset)
            self._text_offset += len(spellings[-1])
        return {
            "tokens": spellings,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": None,
            "text_offset": offsets,
        }
