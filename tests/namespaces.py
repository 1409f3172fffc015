"""Hosts of their own on one machine: network namespaces on a bridge, whose lines to each other can be cut.

Host NAME is at an address of its own and reaches every other host, and this machine, over the bridge. A line is
cut by telling one host a wrong link-layer address of the other: what it sends there is lost without a word, as
when a cable is pulled, and what it sends elsewhere arrives.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Self

_PER_PROCESS = 4
_numbers = count()
_NOWHERE = "02:00:00:00:00:fe"


def missing() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (iproute2)"
    return ""


class Hosts:
    """Named hosts, open as a context; everything is taken down when it is left."""

    def __init__(self, names: tuple[str, ...]) -> None:
        number = os.getpid() * _PER_PROCESS + next(_numbers) % _PER_PROCESS
        self._tag = f"pd{number}"
        self._subnet = f"198.{18 + number // 256 % 2}.{number % 256}"
        self.network = f"{self._subnet}.0/24"
        self._numbers = {name: number for number, name in enumerate(names, start=10)}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._take_down()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._take_down()

    @property
    def prefix(self) -> str:
        """Host NAME is the namespace PREFIX + NAME."""
        return f"{self._tag}-"

    def on(self, name: str) -> tuple[str, ...]:
        """What a command begins with, to run on a host."""
        return "ip", "netns", "exec", f"{self.prefix}{name}"

    def address(self, name: str) -> str:
        return f"{self._subnet}.{self._numbers[name]}"

    @contextmanager
    def cut(self, *lines: tuple[str, str]) -> Iterator[None]:
        """Lose whatever the first host of each line sends to the second, until the context is left."""
        for sender, receiver in lines:
            self._neighbour(sender, receiver, _NOWHERE)
        try:
            yield
        finally:
            for sender, receiver in lines:
                self._neighbour(sender, receiver, self._mac(receiver))

    def _build(self) -> None:
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{self._subnet}.1/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")
        for name in self._numbers:
            space, port = f"{self.prefix}{name}", self._port(name)
            _ip("netns", "add", space)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", port, "master", self._tag, "up")
            _ip("-n", space, "link", "set", "eth0", "address", self._mac(name), "addrgenmode", "none")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def _take_down(self) -> None:
        removals = [("netns", "del", f"{self.prefix}{name}") for name in self._numbers]
        # By themselves: a namespace lives on for as long as its last connection takes to end.
        removals += [("link", "del", self._port(name)) for name in self._numbers]
        for removal in (*removals, ("link", "del", self._tag)):
            with suppress(subprocess.CalledProcessError):
                _ip(*removal)

    def _neighbour(self, host: str, other: str, mac: str) -> None:
        entry = (self.address(other), "lladdr", mac, "dev", "eth0", "nud", "permanent")
        _ip("-n", f"{self.prefix}{host}", "neigh", "replace", *entry)

    def _port(self, name: str) -> str:
        """The bridge's end of a host's line."""
        return f"{self._tag}.{self._numbers[name]}"

    def _mac(self, name: str) -> str:
        return f"02:00:00:00:00:{self._numbers[name]:02x}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)
