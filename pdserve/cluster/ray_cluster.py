"""The Ray cluster engines are placed on: one of our own on this machine, or one that is joined.

A cluster of our own lives and dies with the supervisor. Its Ray processes are children of one child,
`pdserve.launch.ray_head`, which takes them along however the supervisor ends. It listens on 127.0.0.2
only and wants a token that nobody else can read. It is never bound to 127.0.0.1: Ray would rewrite that
to the machine's outer address and then not reach itself.
"""

import asyncio
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pdserve.cluster.launcher import Launched, LaunchSpec
from pdserve.cluster.process_launcher import ProcessLauncher
from pdserve.config.schema import RayConfig
from pdserve.core.errors import ConfigError, EngineDied

OWN_NODE = "127.0.0.2"
_TOKEN = secrets.token_hex(32)
"""For every cluster this process starts: Ray reads the token once per process."""
_SHUTDOWN = 5.0
"""Seconds for Ray to let go of us; what is our own is killed afterwards anyway."""
_JOIN = 30.0
"""Seconds to reach a cluster before its address counts as wrong."""

P = ParamSpec("P")
R = TypeVar("R")


class RayCluster:
    """An open connection to Ray: one per process at a time. Everything of `ray` is called through `call`.

    lost is set when the cluster of our own has ended.
    """

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        # One thread for as long as we are connected: Ray's calls block, and in the main thread it would
        # replace our handler of SIGTERM.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._held = AsyncExitStack()

    @classmethod
    async def open(cls, config: RayConfig, *, cpus: float, launcher: ProcessLauncher) -> "RayCluster":
        """Start a cluster offering at least so many cpus, or join the configured one.

        Raises ConfigError when the address does not answer, EngineDied when a cluster of our own could
        not be started.
        """
        cluster = cls()
        try:
            await cluster._open(config, cpus, launcher)
        except BaseException:
            await cluster.close()
            raise
        return cluster

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a blocking function of Ray's. Raises EngineDied when Ray fails."""
        ray = _ray()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise EngineDied(f"Ray: {str(error).strip().partition(chr(10))[0]}") from error

    async def close(self) -> None:
        """Leave Ray, and end the cluster if it is our own. Within a few seconds; may be called again."""
        await self._held.aclose()
        self._thread.shutdown(wait=False)

    async def _open(self, config: RayConfig, cpus: float, launcher: ProcessLauncher) -> None:
        self._set_environment("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "token"))
        self._set_environment("RAY_USAGE_STATS_ENABLED", "0")
        if config.auth_token_file is not None:
            self._set_environment("RAY_AUTH_TOKEN_PATH", config.auth_token_file)
        if config.address is not None:
            await self._join(config.address, config.node_ip, None)
            return
        # Directly in /tmp, because Ray's sockets lie deep below and their paths are limited to 107 bytes.
        directory = Path(tempfile.mkdtemp(prefix="pdserve-ray-", dir="/tmp"))
        self._held.callback(shutil.rmtree, directory, ignore_errors=True)
        _write_token(directory / "token")
        self._set_environment("RAY_AUTH_TOKEN_PATH", str(directory / "token"))
        node_ip = config.node_ip or OWN_NODE
        head = await self._start_head({"directory": str(directory), "node_ip": node_ip, "cpus": cpus}, launcher)
        await self._join(head, node_ip, directory)

    def _set_environment(self, name: str, value: str) -> None:
        """Ray has no other way to be told; every process of the cluster inherits it."""
        before = os.environ.get(name)
        os.environ[name] = value
        if before is None:
            self._held.callback(os.environ.pop, name, None)
        else:
            self._held.callback(os.environ.__setitem__, name, before)

    async def _start_head(self, payload: dict[str, object], launcher: ProcessLauncher) -> str:
        spec = LaunchSpec(name="ray", module="pdserve.launch.ray_head", payload=payload)
        head = await launcher.launch(spec)
        watching = asyncio.ensure_future(self._watch(head))

        async def end_head() -> None:
            head.terminate()
            await asyncio.wait([watching], timeout=_SHUTDOWN)
            head.kill()
            await watching

        self._held.push_async_callback(end_head)
        facts = await head.ready()
        return str(facts["address"])

    async def _watch(self, head: Launched) -> None:
        await head.ended()
        with suppress(ProcessLookupError):  # a head that was killed has not ended the others of its group
            os.killpg(head.pid, signal.SIGKILL)
        self.lost.set()

    async def _join(self, address: str, node_ip: str | None, directory: Path | None) -> None:
        ray = _ray()
        self._held.push_async_callback(self._leave)
        joining = self.call(
            ray.init,
            address=address,
            namespace="pdserve",
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=node_ip,
            _temp_dir=str(directory) if directory else None,
        )
        try:
            async with asyncio.timeout(_JOIN):
                await joining
        except (TimeoutError, EngineDied) as error:
            cause = str(error) or f"no answer for {_JOIN:g} s"
            if directory:
                raise EngineDied(f"the Ray cluster on {node_ip} cannot be joined: {cause}") from error
            raise ConfigError(f"ray.address: cannot join the Ray cluster at {address}: {cause}") from error
        finally:
            take_back_sigterm()

    async def _leave(self) -> None:
        with suppress(TimeoutError, EngineDied):
            async with asyncio.timeout(_SHUTDOWN):
                await self.call(_ray().shutdown)


def take_back_sigterm() -> None:
    """Make Python's handler the process's again, from the main thread. Ray's core, when it starts, sets one that first
    prints where the process was and aborts it three seconds later: a drain would be cut off."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    signal.siginterrupt(signal.SIGTERM, False)


def cluster_resources() -> dict[str, float]:
    """What all nodes together offer, taken or not. Blocks for a moment."""
    return dict(_ray().cluster_resources())


def require_ray() -> None:
    """Raises ConfigError naming the extra when Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(
            "launcher: ray is not installed; install it with `pip install 'pdserve[ray]'`, "
            "or start plain processes on this machine with `--launcher process`"
        )


def _ray() -> Any:
    """The module, quiet. Imported late: it reads its environment when it is."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def _write_token(path: Path) -> None:
    """For this user only."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(_TOKEN)
