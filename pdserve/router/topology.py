"""Which engines lie near one another, and what moving KV between two is thought to take. Pure.

A domain is what an operator calls engines that share a fast network: an NVLink switch, a rack, a zone. Within one, and
where an engine names none, all links are taken for as fast as one another. Between two domains KV moves as fast as
handoffs over that link have told; before any has, rules.far_factor times slower.
"""

from pdserve.core.cluster import EngineView
from pdserve.router.rules import RoutingRules


def are_apart(one: EngineView, other: EngineView) -> bool:
    """Whether both name a domain, and not the same."""
    return bool(one.domain and other.domain and one.domain != other.domain)


def may_carry(source: EngineView, target: EngineView, rules: RoutingRules) -> bool:
    """Whether target may take KV from source: their link works, and they need not share a domain or do."""
    if source.key in target.lost_links:
        return False
    return rules.topology != "required" or not are_apart(source, target)


def handoff_seconds_per_token(source: EngineView, target: EngineView, rules: RoutingRules) -> float:
    near = rules.fetch_seconds_per_token
    if not are_apart(source, target):
        return near
    return max(near, target.handoff_speeds.get(source.key, rules.far_factor * near))


def fetch_seconds_per_token(source: EngineView, target: EngineView, rules: RoutingRules) -> float:
    """Of KV fetched from a cache, and of a request that moves: both are measured link by link, whatever the domains."""
    factor = rules.far_factor if are_apart(source, target) else 1.0
    return target.fetch_speeds.get(source.key, factor * rules.fetch_seconds_per_token)


def in_words(source: EngineView, target: EngineView) -> str:
    """Where a handoff goes, if both ends name a domain."""
    if not (source.domain and target.domain):
        return ""
    if are_apart(source, target):
        return f"; from domain {source.domain} to {target.domain}"
    return f"; within domain {source.domain}"
