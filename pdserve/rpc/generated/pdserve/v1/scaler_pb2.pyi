from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DemandReport(_message.Message):
    __slots__ = ("gateway", "demand_json")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    DEMAND_JSON_FIELD_NUMBER: _ClassVar[int]
    gateway: str
    demand_json: bytes
    def __init__(self, gateway: _Optional[str] = ..., demand_json: _Optional[bytes] = ...) -> None: ...

class ScalerOrders(_message.Message):
    __slots__ = ("bypass_below", "patience", "figures_json")
    BYPASS_BELOW_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    FIGURES_JSON_FIELD_NUMBER: _ClassVar[int]
    bypass_below: int
    patience: float
    figures_json: bytes
    def __init__(self, bypass_below: _Optional[int] = ..., patience: _Optional[float] = ..., figures_json: _Optional[bytes] = ...) -> None: ...

class ExplainScalingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScalingExplanation(_message.Message):
    __slots__ = ("explanation_json",)
    EXPLANATION_JSON_FIELD_NUMBER: _ClassVar[int]
    explanation_json: bytes
    def __init__(self, explanation_json: _Optional[bytes] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("epoch", "role")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    role: str
    def __init__(self, epoch: _Optional[int] = ..., role: _Optional[str] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("error_code", "error_message")
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    error_code: str
    error_message: str
    def __init__(self, error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...
