"""The listener's options, which every connection to the gateway inherits."""

import socket

import pytest

from pdserve.gateway.serve import bind


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_token_never_waits_for_the_client_to_acknowledge_what_came_before(host: str) -> None:
    with bind(host, 0) as listener:
        listener.setblocking(True)
        with socket.create_connection(listener.getsockname()[:2], timeout=5):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
