"""This machine's addresses, and which of them lies in a network."""

import fcntl
import socket
import struct
from array import array
from ipaddress import IPv4Address, IPv4Network

from pdserve.core.errors import ConfigError

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40
_IFREQ_ADDRESS = slice(20, 24)
"""struct ifreq, netdevice(7): a name of 16 bytes, then a sockaddr_in whose address follows family and port."""
_MOST_ADDRESSES = 1024
_LOOPBACK = "127.0.0.1"


def address_in(network: IPv4Network) -> str:
    """The first of this machine's addresses that lies in the network. Raises ConfigError when none does."""
    ours = local_addresses()
    for address in ours:
        if address in network:
            return str(address)
    raise ConfigError(
        f"engine_network: this machine has no address in {network}, only {', '.join(map(str, ours)) or 'none at all'}; "
        "name the network that joins the machines of your engines"
    )


def own_address(network: IPv4Network | None, given: str | None) -> str:
    """Where others reach a child of a launcher: this machine's address in the network its operator names, else what the
    launcher gives, else the loopback address. Raises ConfigError as address_in does."""
    return address_in(network) if network else given or _LOOPBACK


def local_addresses() -> tuple[IPv4Address, ...]:
    """Every IPv4 address of every interface, in the kernel's order."""
    found = array("B", bytes(_IFREQ_BYTES * _MOST_ADDRESSES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        ifconf = struct.pack("iP", len(found), found.buffer_info()[0])
        used, _ = struct.unpack("iP", fcntl.ioctl(asking.fileno(), _SIOCGIFCONF, ifconf))
    entries = (found[start : start + _IFREQ_BYTES] for start in range(0, used, _IFREQ_BYTES))
    return tuple(IPv4Address(entry[_IFREQ_ADDRESS].tobytes()) for entry in entries)
