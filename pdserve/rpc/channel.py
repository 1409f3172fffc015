"""Settings every gRPC server and channel between pdserve's processes shares."""

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """Plain-text channel. Reconnect back-off is short: peers are few and their deaths are announced."""
    return grpc.aio.insecure_channel(
        address,
        options=[*_OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)],
    )


def new_server() -> grpc.aio.Server:
    return grpc.aio.server(options=list(_OPTIONS))
