"""What an operator may decide about the gateway."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.gateway.auth import TenantKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds that a client may take."""

    receive: float = 60.0
    """To send a request's headers."""
    send: float = 60.0
    """To read anything of what it is sent."""
    close: float = 5.0
    """To read anything of the rest, once its connection is to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Limits and keys of the public edge. Times in seconds."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of these is accepted as `Authorization: Bearer KEY`; without these and tenants, everyone may enter. They
    alone open the admin port."""
    tenants: tuple[TenantKeys, ...] = ()
    max_body_bytes: int = 4 * 2**20
    """A longer HTTP body or gRPC message is refused."""
    max_chat_tokens: int = 1024
    """Cap of a chat answer whose request names no max_tokens."""
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    """SamplingParams fields for requests that do not set them; the model's own recommendation."""
    request_timeout: float = 600.0
    """From arrival to the last token, queueing included."""
    send_timeout: float = 60.0
    """A client that reads nothing for so long is cut off."""
    admin_port: int | None = None
    """Where the admin application listens, told to whoever asks /live; None when it does not."""
    pair_check_timeout: float = 30.0
    """How long the check of a pair of engines may take."""
    requests_kept: int = 1024
    """Records of the latest requests that can be asked for."""
    receive_timeout: float = 60.0
    """A client that has not sent its headers, or then its body, after so long is cut off."""
    answers_kept_for: float = 600.0
    """For how long answers to requests with idempotency keys are kept, where no other router is to know them."""
    answers_kept: int = 1024
    connection_age: float = 10.0
    """A gRPC client opens another connection after so long, behind which its calls on this one end."""

    @property
    def patience(self) -> Patience:
        """With the clients of HTTP connections."""
        return Patience(receive=self.receive_timeout, send=self.send_timeout)
