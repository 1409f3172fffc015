"""What is asked of an engine, and what it answers."""

from dataclasses import asdict
from math import isfinite

from pdserve.core.request import EngineTrace, FinishReason, PrefixFetch, Request, SamplingParams
from pdserve.core.token_delta import TokenDelta
from pdserve.rpc.convert.fields import known, require
from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as pb

_FINISH_REASONS = {reason.value: reason for reason in FinishReason}


def request_to_proto(request: Request) -> pb.Request:
    """Stop strings stay behind: only the gateway's detokenizer decides them."""
    s = request.sampling
    if s.seed is None:
        raise ValueError("a request leaves the gateway with its seed fixed")
    return pb.Request(
        id=request.id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=pb.SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            stop_token_ids=s.stop_token_ids,
            ignore_eos=s.ignore_eos,
            logprobs=s.logprobs,
        ),
        salt=request.salt,
        timeout=request.timeout,
        sample_index=request.sample_index,
    )


def request_from_proto(message: pb.Request) -> Request:
    s = message.sampling
    return Request(
        id=message.id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            repetition_penalty=s.repetition_penalty,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            stop_token_ids=tuple(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            logprobs=s.logprobs,
        ),
        salt=message.salt,
        timeout=message.timeout,
        sample_index=message.sample_index,
    )


def delta_to_proto(delta: TokenDelta) -> pb.TokenDelta:
    code, text = delta.error or ("", "")
    return pb.TokenDelta(
        request_id=delta.request_id,
        index=delta.index,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs or (),
        finish_reason=delta.finish_reason.value if delta.finish_reason else "",
        error_code=code,
        error_message=text,
        trace=trace_to_proto(delta.trace) if delta.trace else None,
    )


def delta_from_proto(message: pb.TokenDelta) -> TokenDelta:
    return TokenDelta(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs) if message.logprobs else None,
        finish_reason=known(_FINISH_REASONS, message.finish_reason, "finish reason") if message.finish_reason else None,
        error=(message.error_code, message.error_message) if message.error_code else None,
        trace=trace_from_proto(message.trace) if message.HasField("trace") else None,
    )


def trace_to_proto(trace: EngineTrace) -> pb.EngineTrace:
    return pb.EngineTrace(
        engine_id=trace.engine_id,
        epoch=trace.epoch,
        cached_tokens=trace.cached_tokens,
        stamps=[pb.Stamp(name=name, unix_seconds=unix) for name, unix in trace.stamps],
        transfer_backend=trace.transfer_backend,
        transfer_bytes=trace.transfer_bytes,
        transfer_pulls=trace.transfer_pulls,
        transfer_mode=trace.transfer_mode,
        transfer_forecast=[pb.NamedSeconds(name=name, seconds=s) for name, s in trace.transfer_forecast],
        transfer_stages=[pb.NamedSeconds(name=name, seconds=s) for name, s in trace.transfer_stages],
        transfer_failovers=[pb.Failover(backend=name, code=code) for name, code in trace.transfer_failovers],
        fetch=pb.PrefixFetch(**asdict(trace.fetch)) if trace.fetch else None,
    )


def trace_from_proto(message: pb.EngineTrace) -> EngineTrace:
    return EngineTrace(
        engine_id=message.engine_id,
        epoch=message.epoch,
        cached_tokens=message.cached_tokens,
        stamps=tuple((stamp.name, stamp.unix_seconds) for stamp in message.stamps),
        transfer_backend=message.transfer_backend,
        transfer_bytes=message.transfer_bytes,
        transfer_pulls=message.transfer_pulls,
        transfer_mode=message.transfer_mode,
        transfer_forecast=tuple((entry.name, entry.seconds) for entry in message.transfer_forecast),
        transfer_stages=tuple((entry.name, entry.seconds) for entry in message.transfer_stages),
        transfer_failovers=tuple((entry.backend, entry.code) for entry in message.transfer_failovers),
        fetch=_fetch_from_proto(message.fetch) if message.HasField("fetch") else None,
    )


def _fetch_from_proto(message: pb.PrefixFetch) -> PrefixFetch:
    require(isfinite(message.seconds + message.restore_seconds), "a fetch takes a finite time")
    return PrefixFetch(
        engine_id=message.engine_id,
        tokens=message.tokens,
        num_bytes=message.num_bytes,
        seconds=message.seconds,
        backend=message.backend,
        error=message.error,
        restore_seconds=message.restore_seconds,
    )
