"""Who asks: API keys, and the prefix-cache salt that follows from them."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256

_SALT_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """An accepted client. salt keeps its cached prefixes apart from those of other keys."""

    salt: bytes


ANYONE = Identity(salt=b"")


class Authenticator:
    """Checks `Authorization` headers; without keys everyone is the same identity."""

    def __init__(self, api_keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in api_keys]

    def identify(self, authorization: str | None) -> Identity | None:
        """The identity behind a header value, None when it may not enter.

        Digests are compared, all of them and in constant time, so that timing tells nothing."""
        if not self._digests:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            return None
        return Identity(salt=blake2b(digest, digest_size=_SALT_BYTES, person=b"pdserve salt").digest())
