"""What a tenant may ask for at most: requests per second, and requests at a time."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.admission import Rejection, TenantRules
from pdserve.core.clock import Clock
from pdserve.core.errors import RateLimited, Unavailable

_SOON = 1.0
"""Seconds after which somebody at a concurrency limit may try again: when its requests end, it sees itself."""


class LimitReached(RateLimited):
    """rejection: which limit it was."""

    def __init__(self, message: str, retry_after: float, rejection: Rejection) -> None:
        super().__init__(message, retry_after)
        self.rejection = rejection


@dataclass(slots=True)
class _Account:
    """tokens: requests that may come at once, as of `at`."""

    tokens: float
    at: float
    inside: int = 0


class TenantCounters(Protocol):
    """What all routers have let in together."""

    async def enter(self, tenant: str, request_id: str, rules: TenantRules) -> tuple[Rejection, float] | None:
        """Count a request; else why not, and the seconds after which it may. Raises Unavailable when nobody can
        tell."""
        ...

    def leave(self, tenant: str, request_id: str) -> None: ...


class TenantLimits:
    """Tenants without rules have no limits. With counters they hold over all routers, while those can be asked;
    otherwise each router holds its own clients to them."""

    def __init__(
        self, tenants: Mapping[str, TenantRules], clock: Clock, counters: TenantCounters | None = None
    ) -> None:
        self._clock = clock
        self._counters = counters
        now = clock.monotonic()
        self._rules = tenants
        self._accounts = {name: _Account(float(rules.burst), now) for name, rules in tenants.items()}

    @asynccontextmanager
    async def inside(self, tenant: str, request_id: str) -> AsyncIterator[None]:
        """One request of the tenant, from its arrival to its end. Raises LimitReached."""
        account = self._accounts.get(tenant)
        if account is None:
            yield
            return
        rules = self._rules[tenant]
        self._check(rules, account)  # first: what this router alone must refuse, no other has to be asked
        account.inside += 1
        try:
            async with self._among_all(tenant, request_id, rules, account):
                yield
        finally:
            account.inside -= 1

    @asynccontextmanager
    async def _among_all(
        self, tenant: str, request_id: str, rules: TenantRules, account: _Account
    ) -> AsyncIterator[None]:
        limited = rules.concurrent_requests is not None or rules.requests_per_second is not None
        if self._counters is None or not limited:
            yield
            return
        refused = None
        with suppress(Unavailable):
            refused = await self._counters.enter(tenant, request_id, rules)
        if refused:
            account.tokens += 1
            raise _refusal(rules, *refused)
        try:
            yield
        finally:
            self._counters.leave(tenant, request_id)

    def _check(self, rules: TenantRules, account: _Account) -> None:
        most, rate = rules.concurrent_requests, rules.requests_per_second
        if most is not None and account.inside >= most:
            raise _refusal(rules, Rejection.CONCURRENCY)
        if rate is None:
            return
        now = self._clock.monotonic()
        account.tokens = min(float(rules.burst), account.tokens + (now - account.at) * rate)
        account.at = now
        if account.tokens < 1:
            raise _refusal(rules, Rejection.RATE, (1 - account.tokens) / rate)
        account.tokens -= 1


def _refusal(rules: TenantRules, rejection: Rejection, wait: float = 0.0) -> LimitReached:
    if rejection is Rejection.CONCURRENCY:
        most = rules.concurrent_requests
        return LimitReached(
            f"{most} requests of yours are in progress, and more at a time are not allowed", _SOON, rejection
        )
    return LimitReached(f"more than {rules.requests_per_second:g} requests per second are not allowed", wait, rejection)
