"""API keys: random, and known to the server by their hash only."""

from hashlib import sha256
from secrets import token_urlsafe

from pdserve.core.errors import ConfigError

_BYTES = 32
_LEAST = 16
"""Characters of a key somebody brings along; a plain hash protects none that can be guessed."""


def new_key() -> tuple[str, str]:
    """(key, hash). 256 random bits need no slow hash."""
    key = f"pd-{token_urlsafe(_BYTES)}"
    return key, digest_of(key)


def digest_of(key: str) -> str:
    """As it is written in the configuration. Raises ConfigError for a key that is too short."""
    if len(key) < _LEAST:
        raise ConfigError(f"a key must have at least {_LEAST} random characters; `pdserve keys new` makes one")
    return f"sha256:{sha256(key.encode()).hexdigest()}"
