"""The gateway's ports, settled before anything is started."""

import errno
import socket
from contextlib import ExitStack

from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError

DEFAULT_ADMIN_PORT = 8002


def settle_ports(config: Config) -> Config:
    """The configuration with a free port in place of each 0, so that a restarted gateway keeps its
    address. Raises ConfigError for a port that is taken, before engines load their models for nothing."""
    with ExitStack() as held:  # all at once, or one could get the number of another
        ports = {name: _settle(held, name, config.host, getattr(config, name)) for name in ("port", "grpc_port")}
        ports["admin_port"] = _settle_admin(held, config)
    return config.model_copy(update=ports)


def _settle_admin(held: ExitStack, config: Config) -> int:
    """Nobody chose the default, so that it is taken is no error."""
    if config.admin_port is not None:
        return _settle(held, "admin_port", config.admin_host, config.admin_port)
    try:
        return _settle(held, "admin_port", config.admin_host, DEFAULT_ADMIN_PORT)
    except ConfigError:
        return _settle(held, "admin_port", config.admin_host, 0)


def _settle(held: ExitStack, name: str, host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        probe.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{name}: {port} on {host} is in use; stop its owner or choose another port") from None
        raise ConfigError(f"{name}: cannot listen on {host}:{port}: {error.strerror or error}") from None
    settled: int = probe.getsockname()[1]
    return settled


def local_address(host: str, port: int) -> str:
    """host:port a client on this machine can use."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{local}]:{port}" if ":" in local else f"{local}:{port}"
