"""Where a gateway and its fronts meet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError

_LONGEST = 107
"""Bytes in the path of a Unix socket (unix(7))."""


@contextmanager
def front_socket(config: Config) -> Iterator[str]:
    """The path of a socket in a directory that only this user may enter; empty where there are no fronts. Raises
    ConfigError when the path is too long."""
    if config.workers == 1 or config.only == "engines":
        yield ""
        return
    with TemporaryDirectory(prefix="pdserve-") as directory:
        path = Path(directory) / "gateway"
        if len(bytes(path)) > _LONGEST:
            raise ConfigError(f"workers: {path} is too long a path for a socket; set TMPDIR to a shorter one")
        yield str(path)
