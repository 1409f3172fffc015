"""Requests with an idempotency key: whoever asks again gets the one answer.

Such a request runs in a task of its own, so that it outlives the connection it came over; its readers, the first one
included, attach to it. When it has ended, its answer is kept where the claims are.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b

import msgspec
import structlog

from pdserve.core.errors import Cancelled, DeadlineExceeded, InvalidRequest, PdserveError, Unavailable
from pdserve.core.msgpack import unpack
from pdserve.core.request import MAX_SEED, FinishReason
from pdserve.gateway.answer import Answer, AnswerView
from pdserve.gateway.auth import Identity
from pdserve.gateway.detokenizer import OutputToken, TextDelta
from pdserve.shared.claims import Busy, Claims, Kept, Mine, check_same
from pdserve.telemetry.metrics import Metrics

_log = structlog.get_logger("pdserve.gateway")

MAX_KEY_CHARACTERS = 255
_NAME_BYTES = 16
_CLOSE_GRACE = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyKey:
    """name: the key as others may see it; fingerprint: of the body it came with."""

    name: str
    fingerprint: bytes

    @classmethod
    def of(cls, key: str, identity: Identity, endpoint: str, body: bytes) -> "IdempotencyKey":
        """Clients with other API keys or tenants, and other endpoints, have keys of their own."""
        owner = blake2b(identity.tenant.encode(), key=identity.salt, digest_size=_NAME_BYTES).digest()
        name = blake2b(f"{endpoint}\0{key}".encode(), key=owner, digest_size=_NAME_BYTES).hexdigest()
        return cls(name=name, fingerprint=blake2b(body, digest_size=_NAME_BYTES).digest())

    @property
    def seed(self) -> int:
        """For a request that gives none: the same draw wherever and however often it is executed."""
        return int.from_bytes(blake2b(self.name.encode(), person=b"pdserve seed").digest()) % (MAX_SEED + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAnswer:
    """An answer that was complete before it was asked for again."""

    request_id: str
    created: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    text: str
    tokens: tuple[tuple[int, float | None], ...]
    finish_reason: FinishReason
    record: dict[str, object]

    @property
    def repeated(self) -> bool:
        return True

    def told(self) -> dict[str, object]:
        return self.record

    def sent(self) -> None:
        """Its record is of the request that had it executed."""

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        tokens = tuple(OutputToken(id=id, logprob=logprob) for id, logprob in self.tokens)
        yield TextDelta(text=self.text, tokens=tokens, finish_reason=self.finish_reason)


_DECODER = msgspec.msgpack.Decoder(KeptAnswer)


def checked_key(key: str) -> str:
    """As a client gave it. Raises InvalidRequest."""
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS or not key.isprintable():
        raise InvalidRequest(
            f"an idempotency key must have 1 to {MAX_KEY_CHARACTERS} printable characters", "idempotency-key"
        )
    return key


class KeyedAnswers:
    """All keyed requests of one gateway. `close` ends those that run, after the time it takes to keep an answer."""

    def __init__(self, claims: Claims, metrics: Metrics) -> None:
        self._claims = claims
        self._metrics = metrics
        self._running: dict[str, _Execution] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        claims.on_taken = self._on_taken

    async def answer(self, key: IdempotencyKey, answer: Answer) -> AnswerView:
        """The answer to a key: the given one, which is executed then, or that of whoever came first.

        Waits for one that another router executes. Raises KeyReused, Unavailable when nobody can tell whether it is
        executed, DeadlineExceeded."""
        expires = asyncio.get_running_loop().time() + answer.request.timeout
        while (left := expires - asyncio.get_running_loop().time()) > 0:
            if execution := self._running.get(key.name):
                check_same(execution.key.fingerprint, key.fingerprint)
                return self._count("attached", execution.attach(repeated=True))
            match await self._claims.claim(key.name, answer.request.id, key.fingerprint):
                case Mine():
                    return self._count("executed", self._execute(key, answer).attach(repeated=False))
                case Kept(result):
                    return self._count("replayed", unpack(result, _DECODER))
                case Busy(certain):
                    await self._claims.changed(key.name, min(certain, left))
        raise DeadlineExceeded(f"the same request was not complete elsewhere after {answer.request.timeout:g} s")

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_GRACE)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _execute(self, key: IdempotencyKey, answer: Answer) -> "_Execution":
        execution = self._running[key.name] = _Execution(key, answer)
        task = asyncio.get_running_loop().create_task(self._run(execution))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return execution

    async def _run(self, execution: "_Execution") -> None:
        name, owner = execution.key.name, execution.answer.request.id
        try:
            await execution.run()
            if result := execution.result():
                await self._claims.finish(name, owner, msgspec.msgpack.encode(result))
            else:
                await self._claims.release(name, owner)
        finally:
            del self._running[name]

    def _on_taken(self, name: str, owner: str) -> None:
        execution = self._running.get(name)
        if execution and execution.answer.request.id == owner:
            _log.warning("another router executes this request, it is ended here", request_id=owner)
            execution.answer.abort(Unavailable("another router executes this request; ask again with the same key"))

    def _count(self, outcome: str, view: AnswerView) -> AnswerView:
        self._metrics.routers.keyed_requests.labels(outcome).inc()
        return view


class _Execution:
    """One request that runs, and all that it has said so far."""

    def __init__(self, key: IdempotencyKey, answer: Answer) -> None:
        self.key = key
        self.answer = answer
        self._deltas: list[TextDelta] = []
        self._news = asyncio.Event()
        self._ended = False
        self._error: PdserveError | None = None

    def attach(self, *, repeated: bool) -> "_Attached":
        return _Attached(self, repeated)

    async def run(self) -> None:
        try:
            async with aclosing(self.answer.deltas()) as deltas:
                async for delta in deltas:
                    self._deltas.append(delta)
                    self._wake()
        except PdserveError as error:
            self._error = error
        except Exception:
            _log.exception("unexpected error in a request with an idempotency key", request_id=self.answer.request.id)
            self._error = PdserveError("internal error; the server's log has the details")
        finally:
            self._error = self._error or (None if self._is_complete() else Cancelled("the server is shutting down"))
            self._ended = True
            self._wake()

    async def read(self) -> AsyncGenerator[TextDelta, None]:
        """From the beginning. Raises what the request failed with."""
        at = 0
        while at < len(self._deltas) or not self._ended:
            if at < len(self._deltas):
                yield self._deltas[at]
                at += 1
            else:
                await self._news.wait()
        if self._error:
            raise self._error

    def result(self) -> KeptAnswer | None:
        """None for one that failed."""
        if self._error:
            return None
        answer = self.answer
        reason = self._deltas[-1].finish_reason
        assert reason is not None
        return KeptAnswer(
            request_id=answer.request_id,
            created=answer.created,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cached_tokens=answer.cached_tokens,
            text="".join(delta.text for delta in self._deltas),
            tokens=tuple((token.id, token.logprob) for delta in self._deltas for token in delta.tokens),
            finish_reason=reason,
            record=answer.told(),
        )

    def _is_complete(self) -> bool:
        return bool(self._deltas) and self._deltas[-1].finish_reason is not None

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class _Attached:
    """One reader of an execution. When it leaves, the execution goes on."""

    def __init__(self, execution: _Execution, repeated: bool) -> None:
        self._execution = execution
        self._answer = execution.answer
        self.repeated = repeated

    @property
    def request_id(self) -> str:
        return self._answer.request_id

    @property
    def created(self) -> int:
        return self._answer.created

    @property
    def prompt_tokens(self) -> int:
        return self._answer.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        return self._answer.completion_tokens

    @property
    def cached_tokens(self) -> int:
        return self._answer.cached_tokens

    def told(self) -> dict[str, object]:
        return self._answer.told()

    def sent(self) -> None:
        self._answer.sent()

    def deltas(self) -> AsyncGenerator[TextDelta, None]:
        return self._execution.read()
