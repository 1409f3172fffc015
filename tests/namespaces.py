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

THIS_MACHINE = "this machine"
"""Outside all namespaces, to be named in lines like a host."""

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
        self._hosts = names
        self._numbers = {name: number for number, name in enumerate((THIS_MACHINE, *names), start=1)}

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
        _ip("link", "set", self._tag, "up")
        self._plug_in(THIS_MACHINE)
        for name in self._hosts:
            _ip("netns", "add", f"{self.prefix}{name}")
            self._plug_in(name)
            self._inside(name, "link", "set", "lo", "up")

    def _plug_in(self, name: str) -> None:
        """Connect to the bridge; not by an address of the bridge itself, which UCX would not use."""
        port, device = self._port(name), self._device(name)
        there = () if name == THIS_MACHINE else ("netns", f"{self.prefix}{name}")
        _ip("link", "add", port, "type", "veth", "peer", "name", device, *there)
        _ip("link", "set", port, "master", self._tag, "up")
        self._inside(name, "link", "set", device, "address", self._mac(name), "addrgenmode", "none")
        self._inside(name, "addr", "add", f"{self.address(name)}/24", "dev", device)
        self._inside(name, "link", "set", device, "up")

    def _take_down(self) -> None:
        removals = [("netns", "del", f"{self.prefix}{name}") for name in self._hosts]
        # By themselves: a namespace lives on for as long as its last connection takes to end.
        removals += [("link", "del", self._port(name)) for name in self._numbers]
        for removal in (*removals, ("link", "del", self._tag)):
            with suppress(subprocess.CalledProcessError):
                _ip(*removal)

    def _neighbour(self, host: str, other: str, mac: str) -> None:
        entry = (self.address(other), "lladdr", mac, "dev", self._device(host), "nud", "permanent")
        self._inside(host, "neigh", "replace", *entry)

    def _inside(self, name: str, *arguments: str) -> None:
        _ip(*(() if name == THIS_MACHINE else ("-n", f"{self.prefix}{name}")), *arguments)

    def _port(self, name: str) -> str:
        """The bridge's end of a host's line."""
        return f"{self._tag}.{self._numbers[name]}"

    def _device(self, name: str) -> str:
        return f"{self.prefix}here" if name == THIS_MACHINE else "eth0"

    def _mac(self, name: str) -> str:
        return f"02:00:00:00:00:{self._numbers[name]:02x}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)
