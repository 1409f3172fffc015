"""Which of its machine's addresses an engine takes."""

from ipaddress import IPv4Address, IPv4Network

import pytest

from pdserve.core.errors import ConfigError
from pdserve.launch.addresses import address_in, local_addresses


def test_the_loopback_address_is_among_this_machines() -> None:
    assert IPv4Address("127.0.0.1") in local_addresses()
    assert len(set(local_addresses())) == len(local_addresses())


@pytest.mark.parametrize("network", ["127.0.0.0/8", "127.0.0.1"])
def test_an_address_is_found_by_its_network_or_by_itself(network: str) -> None:
    assert address_in(IPv4Network(network)) == "127.0.0.1"


def test_a_machine_outside_the_network_is_told_what_it_has() -> None:
    with pytest.raises(ConfigError, match=r"no address in 203\.0\.113\.0/24, only .*127\.0\.0\.1.*; name the network"):
        address_in(IPv4Network("203.0.113.0/24"))
