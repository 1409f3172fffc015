"""Settings every gRPC server and channel between pdserve's processes shares."""

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)


CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *SERVER_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
"""Reconnect back-off is short: peers are few and their deaths are announced."""


def open_channel(address: str) -> grpc.aio.Channel:
    """Plain-text channel."""
    return grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))


def new_server(*, keepalive: float = 10.0, answer: float = 5.0) -> grpc.aio.Server:
    """Ends the calls of a client whose host or network is gone: after keepalive seconds of silence it is pinged, and
    has answer seconds. Its kernel tells of a process that has died, but nobody tells of a host."""
    liveness = (
        ("grpc.keepalive_time_ms", int(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", int(1000 * answer)),
        ("grpc.http2.ping_timeout_ms", int(1000 * answer)),
    )
    return grpc.aio.server(options=[*SERVER_OPTIONS, *liveness])
