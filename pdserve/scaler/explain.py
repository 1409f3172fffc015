"""The scaler's state and decisions as plain values, for operators and programs."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pdserve.scaler.decision import Decision, FlipRole, Scale, SetBypass
from pdserve.scaler.runner import Scaler


def explain(scaler: Scaler) -> dict[str, Any]:
    """JSON-ready: the pools at the last decision, and the latest decisions, oldest first."""
    outcome = scaler.latest
    held: Mapping[Any, str] = outcome.held if outcome else {}
    return {
        "dry_run": scaler.policy.dry_run,
        "interval": scaler.policy.interval,
        "failures": dict(scaler.failures),
        "latest_failure": scaler.latest_failure,
        "bypass_below": outcome.memory.bypass if outcome else 0,
        "pools": [
            {
                "role": each.role.value,
                **asdict(each.replicas),
                "need": each.need,
                "desired": each.desired,
                "rule": each.rule,
                "pressure": each.pressure,
                "held": held.get(each.role, ""),
                "inputs": dict(each.inputs),
            }
            for each in (outcome.assessments if outcome else ())
        ],
        "decisions": [explain_decision(decision) for decision in scaler.decisions],
    }


def explain_decision(decision: Decision) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "at": decision.at,
        "speed": decision.speed.value,
        "what": in_words(decision),
        "rule": decision.rule,
        "reason": decision.reason,
        "dry_run": decision.dry_run,
        "inputs": dict(decision.inputs),
        "alternatives": [asdict(each) for each in decision.alternatives],
    }


def in_words(decision: Decision) -> str:
    match decision.action:
        case Scale(role=role, engines=engines, before=before):
            return f"{role} from {before} to {engines} engines"
        case FlipRole(engine_id=engine_id, role=role):
            return f"{engine_id} becomes a {role} engine"
        case SetBypass(below=0):
            return "decode engines leave prompts to prefill engines"
        case SetBypass(below=below):
            return f"decode engines read prompts of fewer than {below} uncached tokens"
