from pdserve.rpc.generated.pdserve.v1 import engine_pb2 as _engine_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CheckPairRequest(_message.Message):
    __slots__ = ("source_id", "source_epoch", "source_address")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    source_epoch: int
    source_address: str
    def __init__(self, source_id: _Optional[str] = ..., source_epoch: _Optional[int] = ..., source_address: _Optional[str] = ...) -> None: ...

class CheckPairResponse(_message.Message):
    __slots__ = ("check_json",)
    CHECK_JSON_FIELD_NUMBER: _ClassVar[int]
    check_json: str
    def __init__(self, check_json: _Optional[str] = ...) -> None: ...

class PatternRequest(_message.Message):
    __slots__ = ("source_epoch", "most_blocks", "seed", "parts")
    SOURCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    source_epoch: int
    most_blocks: int
    seed: int
    parts: _containers.RepeatedCompositeFieldContainer[_engine_pb2.KVPart]
    def __init__(self, source_epoch: _Optional[int] = ..., most_blocks: _Optional[int] = ..., seed: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[_engine_pb2.KVPart, _Mapping]]] = ...) -> None: ...

class PatternOffer(_message.Message):
    __slots__ = ("blocks", "digests", "facts_json")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    FACTS_JSON_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedCompositeFieldContainer[PatternDigest]
    facts_json: str
    def __init__(self, blocks: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[_Union[PatternDigest, _Mapping]]] = ..., facts_json: _Optional[str] = ...) -> None: ...

class PatternDigest(_message.Message):
    __slots__ = ("num_blocks", "part", "digest")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    part: int
    digest: bytes
    def __init__(self, num_blocks: _Optional[int] = ..., part: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("unix_seconds",)
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    unix_seconds: float
    def __init__(self, unix_seconds: _Optional[float] = ...) -> None: ...
