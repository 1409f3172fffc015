"""Policies and demands for tests of the scaler."""

import json
from typing import Any

from pdserve.core.cluster import StepModel
from pdserve.core.endpoint import EngineState, Role
from pdserve.scaler.demand import Demand, EngineFacts, FirstToken, PromptClass
from pdserve.scaler.policy import Policy

NO_FORECAST = {"kind": "none"}
AT_ONCE = {"cooldown": 0.0, "window": 0.0}


def policy(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **more: Any) -> Policy:
    """Pools that follow signals alone and at once, unless told otherwise."""
    pool = {"max": 16, "forecast": NO_FORECAST, "down": AT_ONCE}
    pools = {"prefill": {**pool, **(prefill or {})}, "decode": {**pool, **(decode or {})}}
    return Policy.model_validate_json(json.dumps({"pools": pools, "bypass": {"enabled": False}, **more}))


def facts(role: Role, number: int, **more: Any) -> EngineFacts:
    """An engine of a pool; by default an idle one."""
    given: dict[str, Any] = {"kv_total": 10_000, "max_rows": 64, "step_tokens": 512, "step": StepModel()} | more
    return EngineFacts(engine_id=f"{role}-{number}", role=role, state=EngineState.READY, **given)


def demand(prefill: int = 2, decode: int = 2, seconds: float = 5.0, **more: Any) -> Demand:
    """Nothing to do for so many engines, unless told otherwise. backlog: seconds of each prefill engine; kv: share in
    use or promised of each decode engine's; running: on each engine."""
    backlog, kv, running = more.pop("backlog", 0.0), more.pop("kv", 0.0), more.pop("running", 0)
    engines = [facts(Role.PREFILL, n, backlog_seconds=backlog, running=running) for n in range(prefill)]
    engines += [facts(Role.DECODE, n, kv_reserved=int(10_000 * kv), running=running) for n in range(decode)]
    return Demand(seconds=seconds, engines=tuple(engines), **more)


def prompts(count: int, seconds: float, tokens: int = 1024) -> tuple[PromptClass, ...]:
    """So many, each so many seconds of work."""
    return (PromptClass(tokens=tokens, requests=count, seconds=count * seconds, squares=count * seconds**2),)


def first(seconds: float, own: float = 0.1) -> FirstToken:
    return FirstToken(seconds=seconds, own=own)
