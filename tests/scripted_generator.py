"""A Generator that plays a script, and an HTTP server around it: the gateway's tests bring their own engines."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import structlog
from tokenizers import Tokenizer as FastTokenizer

from pdserve.core.cluster import EngineView, Mode, Route
from pdserve.core.endpoint import BlockCounts, Endpoint, EngineState, LoadSnapshot, Role
from pdserve.core.request import EngineTrace, FinishReason, Request
from pdserve.core.token_delta import TokenDelta
from pdserve.gateway.gateway import Gateway
from pdserve.gateway.http.app import create_admin_app, create_app
from pdserve.gateway.serve import bind, serve_http
from pdserve.gateway.settings import GatewaySettings
from pdserve.gateway.tokenizer import Tokenizer
from pdserve.telemetry.record import RequestRecord
from tests.tiny_tokenizers import MODEL

HANG = "hang"
"""In a script: wait until the request is cancelled."""

EPOCH = 2**64 - 3
Step = TokenDelta | Exception | str | threading.Event
"""What a generator does next: yield, raise, hang, or wait for another thread."""
Script = Callable[[Request], Sequence[Step]]


def endpoint(engine_id: str, role: Role) -> Endpoint:
    return Endpoint(
        engine_id=engine_id, role=role, epoch=EPOCH, address="127.0.0.1:9", pid=4242, state=EngineState.READY
    )


PREFILL, DECODE = endpoint("prefill-0", Role.PREFILL), endpoint("decode-0", Role.DECODE)


def speak(tokenizer: FastTokenizer, text: str, *, end: FinishReason | None = FinishReason.LENGTH) -> Script:
    """A script that says text, one token per delta; without end the last delta is no last one."""

    def script(request: Request) -> list[Step]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        deltas: list[Step] = []
        for i, token_id in enumerate(ids):
            deltas.append(
                TokenDelta(
                    request_id=request.id,
                    index=i,
                    token_ids=(token_id,),
                    logprobs=(-0.5 * i,) if request.sampling.logprobs else None,
                    finish_reason=end if i == len(ids) - 1 else None,
                )
            )
        return deltas

    return script


class ScriptedGenerator:
    """Counts what it was asked, and tells when each request was closed. Safe to inspect from another thread."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.ready = True
        self.requests: list[Request] = []
        self.started = threading.Event()
        self.closed = threading.Event()

    async def generate(self, request: Request, record: RequestRecord) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.started.set()
        record.route = Route(mode=Mode.DISAGGREGATED, prefill=PREFILL, decode=DECODE, reason="scripted")
        record.prefill_trace = EngineTrace(engine_id="prefill-0", epoch=EPOCH, cached_tokens=3, stamps=())
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, threading.Event):
                    assert await asyncio.to_thread(step.wait, 10)
                    continue
                if isinstance(step, str):
                    await asyncio.Event().wait()
                    raise AssertionError("nothing ends this wait but a cancellation")
                record.stamp(f"token_{step.index}", 0.0)
                yield step
        finally:
            record.stamp("closed", 1.0)
            self.closed.set()

    def engines(self) -> tuple[EngineView, ...]:
        load = LoadSnapshot(
            engine_id="prefill-0",
            epoch=EPOCH,
            number=1,
            running=2,
            waiting=1,
            backlog_tokens=70,
            blocks=BlockCounts(total=10, free=4, used=3, leased=2, quarantined=1),
            draining=False,
        )
        return EngineView(endpoint=PREFILL, load=load), EngineView(endpoint=DECODE, load=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpServer:
    """A server in a thread of its own."""

    url: str
    admin_url: str
    gateway: Gateway
    loop: asyncio.AbstractEventLoop

    def leave(self) -> None:
        asyncio.run_coroutine_threadsafe(self.gateway.intake.left(60, 0.2), self.loop).result(10)

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(setattr, self.gateway.intake, "draining", True)


@contextmanager
def http_server(
    generator: ScriptedGenerator, tokenizer: Tokenizer, settings: GatewaySettings | None = None, grace: float = 5.0
) -> Iterator[HttpServer]:
    """A listening server; left when it has shut down."""
    listeners = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    url, admin_url = (f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners)
    servers: list[HttpServer] = []
    stops: list[asyncio.Event] = []
    listening = threading.Event()

    async def main() -> None:
        gateway = Gateway(generator, tokenizer, MODEL, settings)
        patience = replace(gateway.settings.patience, close=0.5)
        stops.append(asyncio.Event())
        servers.append(HttpServer(url=url, admin_url=admin_url, gateway=gateway, loop=asyncio.get_running_loop()))
        listening.set()
        async with asyncio.TaskGroup() as group:
            for app, listener in zip((create_app(gateway), create_admin_app(gateway)), listeners, strict=True):
                group.create_task(serve_http(app, listener, stops[0], grace, patience=patience))

    # structlog's default prints fancy tracebacks, which takes seconds each.
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert listening.wait(10)
    try:
        yield servers[0]
    finally:
        servers[0].loop.call_soon_threadsafe(stops[0].set)
        thread.join(20)
        structlog.reset_defaults()
        assert not thread.is_alive()
