"""What a tenant may ask for at most: requests per second, and requests at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pdserve.core.admission import Rejection, TenantRules
from pdserve.core.clock import Clock
from pdserve.core.errors import RateLimited

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


class TenantLimits:
    """Tenants without rules have no limits."""

    def __init__(self, tenants: Mapping[str, TenantRules], clock: Clock) -> None:
        self._clock = clock
        now = clock.monotonic()
        self._rules = tenants
        self._accounts = {name: _Account(float(rules.burst), now) for name, rules in tenants.items()}

    @contextmanager
    def inside(self, tenant: str) -> Iterator[None]:
        """One request of the tenant, from its arrival to its end. Raises LimitReached."""
        account = self._accounts.get(tenant)
        if account is None:
            yield
            return
        self._check(self._rules[tenant], account)
        account.inside += 1
        try:
            yield
        finally:
            account.inside -= 1

    def _check(self, rules: TenantRules, account: _Account) -> None:
        most, rate = rules.concurrent_requests, rules.requests_per_second
        if most is not None and account.inside >= most:
            message = f"{most} requests of yours are in progress, and more at a time are not allowed"
            raise LimitReached(message, _SOON, Rejection.CONCURRENCY)
        if rate is None:
            return
        now = self._clock.monotonic()
        account.tokens = min(float(rules.burst), account.tokens + (now - account.at) * rate)
        account.at = now
        if account.tokens < 1:
            message = f"more than {rate:g} requests per second are not allowed"
            raise LimitReached(message, (1 - account.tokens) / rate, Rejection.RATE)
        account.tokens -= 1
