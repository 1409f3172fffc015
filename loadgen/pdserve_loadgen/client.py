"""Sends one request and stamps what comes back."""

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import httpx
import orjson

from pdserve_loadgen.endpoint import Endpoint, Exchange, StreamReading, error_code
from pdserve_loadgen.errors import Unreachable
from pdserve_loadgen.result import Outcome
from pdserve_loadgen.sse import SseParser

CONNECT_TIMEOUT = 10.0
_MAX_ERROR_BODY = 65536

Clock = Callable[[], float]


@dataclass(slots=True, kw_only=True)
class Answer:
    """One exchange with the server; stamps on the client's clock."""

    sent: float
    token_times: "array[float]"
    finished: float = 0.0
    outcome: Outcome = Outcome.ERROR
    error: str | None = None
    request_id: str | None = None
    text: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def fail(self, code: str) -> None:
        """What went wrong first is what is told: after an error event a server may just hang up."""
        self.outcome, self.error = Outcome.ERROR, self.error or code


class Client:
    """Connections to one endpoint, as many as there are requests at once, kept for the next.

    The environment's proxies are not used: they would be measured along."""

    def __init__(self, endpoint: Endpoint, clock: Clock) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._http = httpx.AsyncClient(
            base_url=endpoint.url,
            headers={**endpoint.headers, "Content-Type": "application/json", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(endpoint.timeout, connect=min(CONNECT_TIMEOUT, endpoint.timeout)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, exchange: Exchange, max_tokens: int, name: str, cancel_after: int | None = None) -> Answer:
        """One request to its end. Failures are in the answer, not raised; name is sent as x-request-id.

        cancel_after: hang up after so many pieces of the answer."""
        body = self._endpoint.body(exchange, max_tokens)
        answer = Answer(sent=self._clock(), token_times=array("d"))
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                await self._stream(body, name, answer, cancel_after)
        except (TimeoutError, httpx.TimeoutException):
            answer.fail("timeout")
        except httpx.ConnectError:
            answer.fail("connect_failed")
        except httpx.HTTPError:
            answer.fail("connection_lost")
        except ValueError:
            answer.fail("stream_unreadable")
        answer.finished = self._clock()
        return answer

    async def _stream(self, body: bytes, name: str, answer: Answer, cancel_after: int | None) -> None:
        headers = {"x-request-id": name}
        async with self._http.stream("POST", self._endpoint.path, content=body, headers=headers) as response:
            answer.request_id = response.headers.get("x-request-id")
            if response.status_code != 200:
                answer.fail(await _refusal(response))
                return
            await self._read(response, answer, cancel_after)

    async def _read(self, response: httpx.Response, answer: Answer, cancel_after: int | None) -> None:
        reading = StreamReading()
        try:
            is_whole = await self._take_pieces(response, answer, reading, cancel_after)
        finally:
            answer.text = "".join(reading.text)
            answer.prompt_tokens, answer.completion_tokens = reading.prompt_tokens, reading.completion_tokens
            if reading.error:
                answer.fail(f"stream:{reading.error}")
        if not is_whole:
            answer.outcome = Outcome.CANCELLED
        elif reading.finished and not answer.error:
            answer.outcome = Outcome.OK
        else:
            answer.fail("stream_broken")

    async def _take_pieces(
        self, response: httpx.Response, answer: Answer, reading: StreamReading, cancel_after: int | None
    ) -> bool:
        """Stamps pieces until the stream ends (True) or the client has had enough of them (False)."""
        parser = SseParser()
        async with aclosing(cast("AsyncGenerator[bytes]", response.aiter_raw())) as chunks:
            while cancel_after is None or len(answer.token_times) < cancel_after:
                chunk = await anext(chunks, None)
                if chunk is None:
                    return True
                now = self._clock()
                for event in parser.feed(chunk):
                    if reading.take(event):
                        answer.token_times.append(now)
        return False

    async def models(self) -> list[str]:
        """Names the server serves. Raises Unreachable."""
        try:
            response = await self._http.get("/v1/models", timeout=CONNECT_TIMEOUT)
            response.raise_for_status()
            return [str(model["id"]) for model in response.json()["data"]]
        except httpx.HTTPStatusError as error:
            hint = "; give --api-key" if error.response.status_code == 401 else ""
            raise Unreachable(f"{error.request.url} answered {error.response.status_code}{hint}") from None
        except httpx.HTTPError as error:
            raise Unreachable(
                f"nothing answers at {self._endpoint.url} ({type(error).__name__}); check --url"
            ) from None
        except (KeyError, TypeError, ValueError):
            raise Unreachable(f"{self._endpoint.url}/v1/models is not a list of models; give --model") from None


async def _refusal(response: httpx.Response) -> str:
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > _MAX_ERROR_BODY:
            break
    try:
        code = error_code(orjson.loads(body))
    except ValueError:
        code = None
    return f"http_{response.status_code}:{code}" if code else f"http_{response.status_code}"
