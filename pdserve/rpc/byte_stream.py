"""Serving and reading spans of bytes over gRPC. Synchronous: both ends live in threads of their own."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import grpc

from pdserve.core.errors import PdserveError, TransferFailed
from pdserve.rpc.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.rpc.generated.pdserve.v1 import kv_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["KVBytesService"]
_METHOD = _SERVICE.methods_by_name["Read"]
_SERVERS = 8
"""Reads served at the same time; further ones wait."""

ReadHandler = Callable[[pb.ReadSpans], Iterator[bytes]]


class SpanServer:
    """Answers reads with handler's bytes as fast as the reader takes them. A PdserveError refuses a read."""

    def __init__(self, host: str, handler: ReadHandler) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(_SERVERS, thread_name_prefix="kv-grpc-serve"), options=list(SERVER_OPTIONS)
        )
        method = grpc.unary_stream_rpc_method_handler(
            _serving(handler),
            request_deserializer=pb.ReadSpans.FromString,
            response_serializer=pb.SpanBytes.SerializeToString,
        )
        handlers = grpc.method_handlers_generic_handler(_SERVICE.full_name, {_METHOD.name: method})
        self._server.add_generic_rpc_handlers((handlers,))
        self.port = self._server.add_insecure_port(f"{host}:0")
        self._server.start()

    def close(self) -> None:
        """Break off what is being served."""
        self._server.stop(0).wait()


class SpanCall:
    """One read under way: iterate over its bytes. Raises TransferFailed when the peer cannot or will not."""

    def __init__(self, call: "grpc._CallIterator[pb.SpanBytes]") -> None:
        self._call = call

    def __iter__(self) -> Iterator[bytes]:
        try:
            for message in self._call:
                yield message.data
        except grpc.RpcError as error:
            raise TransferFailed(_words(error)) from error

    def cancel(self) -> None:
        self._call.cancel()


class SpanReader:
    """A connection to one SpanServer."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=list(CHANNEL_OPTIONS))
        self._read = self._channel.unary_stream(
            f"/{_SERVICE.full_name}/{_METHOD.name}",
            request_serializer=pb.ReadSpans.SerializeToString,
            response_deserializer=pb.SpanBytes.FromString,
        )

    def read(self, request: pb.ReadSpans, timeout: float) -> SpanCall:
        """Begin a read that ends within timeout seconds."""
        return SpanCall(self._read(request, timeout=timeout))

    def close(self) -> None:
        self._channel.close()


def _serving(
    handler: ReadHandler,
) -> "Callable[[pb.ReadSpans, grpc.ServicerContext], Iterator[pb.SpanBytes]]":
    def serve(request: pb.ReadSpans, context: grpc.ServicerContext) -> Iterator[pb.SpanBytes]:
        try:
            for data in handler(request):
                yield pb.SpanBytes(data=data)
        except PdserveError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    return serve


def _words(error: grpc.RpcError) -> str:
    call = cast(grpc.Call, error)
    return f"{call.code().name.lower().replace('_', ' ')}: {call.details() or 'no reason given'}"
