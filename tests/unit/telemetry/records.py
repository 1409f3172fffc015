"""Records of requests as dispatch and gateway would have left them. Times are in seconds after START."""

from dataclasses import replace

from pdserve.core.cluster import Candidate, FetchPlan, Mode, Prediction, Route
from pdserve.core.endpoint import Endpoint, EngineState, Role
from pdserve.core.errors import EngineDied
from pdserve.core.request import EngineTrace, PrefixFetch
from pdserve.core.ticket import KVSource
from pdserve.telemetry.record import Migration, MoveReason, RequestRecord

START = 1_000_000.0
EPOCH = 2**64 - 5


def endpoint(engine_id: str, epoch: int = EPOCH, state: EngineState = EngineState.READY) -> Endpoint:
    role = Role(engine_id.partition("-")[0])
    return Endpoint(engine_id=engine_id, role=role, epoch=epoch, address="127.0.0.1:9", pid=7, state=state)


def route(prefill: str = "prefill-0", decode: str = "decode-0", mode: Mode = Mode.DISAGGREGATED) -> Route:
    return Route(
        mode=mode,
        prefill=endpoint(prefill),
        decode=endpoint(decode),
        reason="cheapest",
        uncached_tokens=60,
        prediction=Prediction(ttft=0.05, handoff_gap=0.01, tpot=0.002, cost=1.5),
        alternatives=(
            Candidate(prefill="prefill-1", decode=decode, mode=mode, cost=2.0, reason="busier"),
            Candidate(prefill=None, decode=decode, mode=Mode.DECODE_LOCAL, cost=4.0),
        ),
    )


def trace(engine_id: str, *stamps: tuple[str, float], backend: str = "") -> EngineTrace:
    return EngineTrace(
        engine_id=engine_id,
        epoch=EPOCH,
        cached_tokens=4 if engine_id.startswith("prefill") else 0,
        stamps=tuple((name, START + at) for name, at in stamps),
        transfer_backend=backend,
        transfer_bytes=4096 if backend else 0,
        transfer_pulls=2 if backend else 0,
        transfer_mode="progressive" if backend else "",
        transfer_forecast=(("progressive", 0.003), ("bulk", 0.005)) if backend else (),
        transfer_stages=(("queue", 0.001), ("post", 0.002), ("wire", 0.003), ("verify", 0.004)) if backend else (),
        transfer_failovers=(("nixl", "transfer_failed"),) if backend else (),
    )


def stamps(*pairs: tuple[str, float]) -> list[tuple[str, float]]:
    return [(name, START + at) for name, at in pairs]


def disaggregated(request_id: str = "cmpl-abc", client_id: str = "") -> RequestRecord:
    """Ended well: 20 ms in the gateway, 5 ms queued, 20 ms prefill, transfer beside it, 55 ms decoding."""
    return RequestRecord(
        request_id=request_id,
        client_id=client_id,
        endpoint="completions",
        prompt_tokens=64,
        output_tokens=12,
        status="ok",
        finish_reason="length",
        route=route(),
        prefill_trace=trace(
            "prefill-0",
            ("queued", 0.020),
            ("scheduled", 0.025),
            ("prompt_computed", 0.044),
            ("first_token", 0.045),
            ("finished", 0.045),
        ),
        decode_trace=trace(
            "decode-0",
            ("queued", 0.028),
            ("fetching", 0.029),
            ("attached", 0.030),
            ("first_pull", 0.040),
            ("last_pull", 0.048),
            ("released", 0.049),
            ("fetched", 0.050),
            ("finished", 0.104),
            backend="shared_memory",
        ),
        stamps=stamps(
            ("arrived", 0.0),
            ("read", 0.004),
            ("tokenized", 0.010),
            ("received", 0.012),
            ("routed", 0.015),
            ("ticket", 0.027),
            ("first_token", 0.046),
            ("first_sent", 0.047),
            ("second_token", 0.060),
            ("finished", 0.105),
        ),
    )


def fetching(tokens: int = 48, error: str = "") -> RequestRecord:
    """As disaggregated, after a fetch of 48 planned tokens that brought so many, or ended with an error."""
    record = disaggregated()
    assert record.route
    assert record.prefill_trace
    source = KVSource(engine_id="decode-1", epoch=EPOCH, address="127.0.0.1:9", num_blocks=3)
    plan = FetchPlan(source=source, tokens=48, seconds=0.006, saved_seconds=0.020)
    record.route = replace(record.route, fetch=plan)
    fetch = PrefixFetch(
        engine_id="decode-1", tokens=tokens, num_bytes=2048, seconds=0.004, backend="shared_memory", error=error
    )
    record.prefill_trace = replace(record.prefill_trace, fetch=fetch)
    return record


def replayed() -> RequestRecord:
    """The first attempt lost its decode engine after one token; the second went through."""
    record = disaggregated()
    record.stamps = stamps(("arrived", 0.0), ("received", 0.001), ("routed", 0.002), ("first_token", 0.008))
    record.route = route(decode="decode-0")
    record.give_up(EngineDied("decode-0 died"), emitted_tokens=1, unix=START + 0.009)
    again = disaggregated()
    record.route, record.prefill_trace, record.decode_trace = route(decode="decode-1"), again.prefill_trace, None
    record.stamps += stamps(("routed", 0.012), ("finished", 0.105))
    return record


def moved() -> RequestRecord:
    """As disaggregated, but it moved on to another engine, the second time it was tried."""
    record = disaggregated()
    record.migrations = [
        Migration(
            source="decode-0",
            target="decode-1",
            asked=START + 0.062,
            reason=MoveReason.DRAIN,
            ended=START + 0.066,
            outcome="transfer_failed",
        ),
        Migration(
            source="decode-0",
            target="decode-1",
            asked=START + 0.07,
            reason=MoveReason.REBALANCE,
            why="decode-0 is full",
            ended=START + 0.09,
            outcome="ok",
            pause=0.004,
            trace=trace("decode-1", ("queued", 0.072), ("fetched", 0.088), ("finished", 0.104), backend="nixl"),
        ),
    ]
    return record
