"""What HTTP and gRPC have in common: checks against the model, and the start of an answer."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from uuid import UUID

from pdserve.core.clock import Clock, SystemClock
from pdserve.core.errors import InvalidRequest, ModelNotFound
from pdserve.core.protocols import ModelInfo
from pdserve.core.request import MAX_SEED, Request, SamplingParams
from pdserve.gateway.answer import Answer, AnswerContext, AnswerView
from pdserve.gateway.auth import Authenticator, Identity
from pdserve.gateway.detokenizer import Detokenizer
from pdserve.gateway.intake import Intake
from pdserve.gateway.keyed import IdempotencyKey, KeyedAnswers
from pdserve.gateway.ports import (
    CountElsewhere,
    Elsewhere,
    EngineSummary,
    ExplainScaling,
    Generator,
    MoveRequest,
    OrderEngine,
    Overview,
    PreparePrompt,
)
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.shared.claims import Claims, LocalClaims
from pdserve.telemetry.metrics import Metrics
from pdserve.telemetry.record import RequestRecord
from pdserve.telemetry.request_ring import RequestRing


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A tokenized request as an endpoint hands it on.

    prompt_param is the prompt's name in errors, client_id what the client calls the request.
    """

    id: str
    endpoint: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    identity: Identity
    prompt_param: str = "prompt"
    client_id: str = ""
    traceparent: str = ""
    """The W3C trace context the client sent, as it came."""
    stamps: tuple[tuple[str, float], ...] = ()
    """What happened before the request was accepted, from its arrival on (Unix seconds)."""
    priority: int = 0
    """As the client asks for it; the lower goes first."""
    timeout: float | None = None
    """Seconds the client gives us; the setting's limit when None or longer."""
    key: IdempotencyKey | None = None


class Gateway:
    """One served model behind the public endpoints. Created on the event loop it runs on."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        model: ModelInfo,
        settings: GatewaySettings | None = None,
        *,
        clock: Clock | None = None,
        random: Random | None = None,
        order_engine: OrderEngine | None = None,
        move_request: MoveRequest | None = None,
        waiting: Callable[[], Mapping[str, int]] | None = None,
        explain_scaling: ExplainScaling | None = None,
        claims: Claims | None = None,
        degraded: Callable[[], Sequence[str]] = tuple,
        prepare: PreparePrompt | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """order_engine, move_request, explain_scaling: None where nobody owns the engines, where requests cannot move,
        where pools stay as they are. waiting: how many requests wait to be let in, by tenant. claims: on requests with
        idempotency keys; this process's own by default. degraded: what is missing, though requests are served.
        elsewhere: the gateway this is a front of."""
        self.generator = generator
        self.move_request = move_request
        self.order_engine = order_engine
        self.explain_scaling = explain_scaling
        self.degraded = degraded
        self.tokenizer = tokenizer
        self.model = model
        self.settings = settings or GatewaySettings()
        self.clock = clock or SystemClock()
        self.started = self.clock.unix()
        self.metrics = Metrics()
        self.metrics.watch_engines(generator.engines)
        self.intake = Intake()
        self.ring = RequestRing(self.settings.requests_kept)
        self.authenticator = Authenticator(self.settings.api_keys, self.settings.tenants)
        self.operators = Authenticator(self.settings.api_keys)
        if waiting is not None:
            self.metrics.watch_waiting(waiting)
        if claims is None:
            keep, most = self.settings.answers_kept_for, self.settings.answers_kept
            claims = LocalClaims(self.clock, keep=keep, max_answers=most)
        self.claims = claims
        self.keyed = KeyedAnswers(claims, self.metrics)
        self.count_elsewhere: CountElsewhere | None = None
        """Set by whoever knows other processes that count for this gateway."""
        self._elsewhere = elsewhere
        self._random = random or SystemRandom()
        self._context = AnswerContext(
            generator=generator,
            intake=self.intake,
            metrics=self.metrics,
            ring=self.ring,
            clock=self.clock,
            on_end=[],
            prepare=prepare,
        )

    @property
    def ready(self) -> bool:
        return self.generator.ready and not self.intake.leaving

    def tell_ends(self, told: Callable[[RequestRecord], None]) -> None:
        """Have every ended request's record handed to a function that must not block."""
        self._context.on_end.append(told)

    async def abort(self, request_id: str, identity: Identity) -> bool:
        """End a request of the identity, whichever process serves it. False when it has none of that id running."""
        if self.intake.abort(request_id, identity):
            return True
        return self._elsewhere is not None and await self._elsewhere.abort(request_id, identity)

    async def overview(self) -> Overview:
        if self._elsewhere is not None:
            return await self._elsewhere.overview()
        engines = tuple(
            EngineSummary(
                endpoint=view.endpoint,
                running=view.load.running if view.load else 0,
                waiting=view.load.waiting if view.load else 0,
            )
            for view in self.generator.engines()
        )
        return Overview(running=len(self.intake), engines=engines)

    async def exposition(self) -> bytes:
        """Everything this gateway has counted, in all its processes, for Prometheus."""
        return self.metrics.exposition(await self.count_elsewhere() if self.count_elsewhere else {})

    def new_id(self) -> str:
        """32 hexadecimal digits naming one request."""
        return UUID(int=self._random.getrandbits(128), version=4).hex

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound unless name is the served model's, or left out."""
        if name and name != self.model.name:
            raise ModelNotFound(f"this server serves {self.model.name!r}, not {name[:200]!r}")

    async def encode(self, text: str) -> list[int]:
        """Tokens of a raw prompt; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self.tokenizer.encode_chat, messages)

    def room(self, num_prompt_tokens: int, param: str) -> int:
        """Tokens the context has left after a prompt. Raises InvalidRequest naming param when there is none."""
        room = self.model.max_model_len - num_prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {num_prompt_tokens} tokens; with at least one token of answer "
                f"the context holds {self.model.max_model_len}",
                param,
            )
        return room

    async def answer(self, ask: Ask) -> AnswerView:
        """Accept a request; with an idempotency key it may be answered already, or be executed elsewhere: then this
        waits for it. Raises as begin and KeyedAnswers.answer do."""
        answer = self.begin(ask)
        return await self.keyed.answer(ask.key, answer) if ask.key else answer

    def begin(self, ask: Ask) -> Answer:
        """Accept a request; it runs once the answer's deltas are iterated.

        Raises InvalidRequest when it does not fit the model, Unavailable while draining."""
        self.intake.check()
        limit = self.settings.request_timeout
        request = Request(
            id=ask.id,
            prompt_token_ids=tuple(ask.prompt_token_ids),
            sampling=self._fit(ask),
            salt=ask.identity.salt,
            timeout=limit if ask.timeout is None else min(limit, ask.timeout),
            tenant=ask.identity.tenant,
            priority=max(ask.priority, ask.identity.most_urgent),
        )
        detokenizer = Detokenizer(self.tokenizer.vocabulary, request.sampling, self.model.eos_token_ids)
        record = RequestRecord(
            request_id=ask.id,
            client_id=ask.client_id,
            endpoint=ask.endpoint,
            traceparent=ask.traceparent,
            prompt_tokens=len(request.prompt_token_ids),
            stamps=list(ask.stamps),
        )
        return Answer(self._context, request, detokenizer, record)

    def _fit(self, ask: Ask) -> SamplingParams:
        sampling, vocab_size = ask.sampling, self.model.vocab_size
        if not ask.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens", ask.prompt_param)
        room = self.room(len(ask.prompt_token_ids), ask.prompt_param)
        _check_token_ids(ask.prompt_token_ids, vocab_size, ask.prompt_param)
        _check_token_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
        if sampling.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {sampling.max_tokens}, but the prompt's {len(ask.prompt_token_ids)} tokens leave room "
                f"for {room} in a context of {self.model.max_model_len}",
                "max_tokens",
            )
        seed = sampling.seed
        if seed is None:
            seed = ask.key.seed if ask.key else self._random.randint(0, MAX_SEED)
        return replace(sampling, seed=seed, top_k=0 if sampling.top_k >= vocab_size else sampling.top_k)


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise InvalidRequest(f"{param} has a token id outside 0 to {vocab_size - 1}", param)
