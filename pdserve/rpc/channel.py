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


def new_server() -> grpc.aio.Server:
    return grpc.aio.server(options=list(SERVER_OPTIONS))
