"""Who asks: API keys, the tenant they belong to, and the prefix-cache salt that follows from it."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256

from pdserve.core.admission import DEFAULT_TENANT, MOST_URGENT

_SALT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """An accepted client. salt keeps its cached prefixes apart from those of others; most_urgent is the priority it
    gets when it asks for a more urgent one."""

    salt: bytes
    tenant: str = DEFAULT_TENANT
    most_urgent: int = MOST_URGENT


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKeys:
    """A tenant as the gateway knows it. digests: SHA-256 of each of its keys. share_group: those who have it in common
    share a cache."""

    name: str
    digests: tuple[bytes, ...]
    share_group: str | None = None
    most_urgent: int = 0

    @property
    def identity(self) -> Identity:
        return Identity(salt=self._salt, tenant=self.name, most_urgent=self.most_urgent)

    @property
    def _salt(self) -> bytes:
        """By name and not by key, so that a key may be exchanged without losing what is cached."""
        if self.share_group is not None:
            return _salt(self.share_group.encode(), b"pdserve group")
        return _salt(self.name.encode(), b"pdserve tenant")


ANYONE = Identity(salt=b"")


class Authenticator:
    """Checks `Authorization` headers. Without keys and tenants everyone is the same identity."""

    def __init__(self, api_keys: Sequence[str], tenants: Sequence[TenantKeys] = ()) -> None:
        self._known: dict[bytes, tuple[bytes, Identity]] = {}
        for tenant in tenants:
            for digest in tenant.digests:
                self._add(digest, tenant.identity)
        for key in api_keys:
            digest = sha256(key.encode()).digest()
            self._add(digest, Identity(salt=_salt(digest, b"pdserve salt")))

    def identify(self, authorization: str | None) -> Identity | None:
        """The identity behind a header value, None when it may not enter.

        Found by the beginning of its key's digest and compared in constant time: what timing tells of a digest does
        not help to guess a key."""
        if not self._known:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = sha256(key.strip().encode()).digest()
        known, identity = self._known.get(digest[:_SALT_BYTES], (bytes(len(digest)), None))
        return identity if hmac.compare_digest(digest, known) else None

    def _add(self, digest: bytes, identity: Identity) -> None:
        self._known[digest[:_SALT_BYTES]] = digest, identity


def _salt(name: bytes, person: bytes) -> bytes:
    return blake2b(name, digest_size=_SALT_BYTES, person=person).digest()
