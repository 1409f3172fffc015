"""What clients are promised, allowed and charged: the sections of the configuration that a gateway goes by."""

from typing import Annotated

from pydantic import ByteSize, Field, SecretStr, SerializationInfo, field_serializer

from pdserve.config.section import NonEmpty, Positive, Priority, Section, shown


class SloConfig(Section):
    """What a new request is held against before it is let in. The defaults suit no application: they only keep a
    cluster that has far too much to do from doing it too late. Set your own."""

    ttft: Annotated[float, Field(gt=0)] = 10.0
    """Seconds from a request's arrival to its first token."""
    tpot: Annotated[float, Field(gt=0)] = 1.0
    """Seconds per token after the first."""


class AdmissionConfig(Section):
    """Requests that no engine can start yet wait in the gateway; those whose first token would come too late are told
    so at once."""

    enabled: bool = True
    """false: everything goes to the engines at once and waits there. Tenants' limits hold nevertheless."""
    headroom: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of slo.ttft that a predicted wait may use up; predictions err."""
    max_waiting: Positive = 256
    """Requests of one tenant that may wait."""
    steps_ahead: Annotated[float, Field(ge=0)] = 0.25
    """Full steps of prompts that engines have in front of them before requests wait here. With none, short prompts are
    computed one by one; more makes everybody wait for whoever sends most."""


class TenantConfig(Section):
    """Clients with keys, a share of the cluster and a cache of their own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    keys: tuple[Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")], ...]
    """SHA-256 of each API key, as `pdserve keys new` prints it."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the engines against other tenants', while they want more than there is."""
    requests_per_second: Annotated[float, Field(gt=0)] | None = None
    burst: Positive | None = None
    """Requests that may come at once; by default what may come in a second."""
    concurrent_requests: Positive | None = None
    """Those in progress, waiting ones included."""
    share_group: NonEmpty | None = None
    """Tenants that name the same group find each other's prompts in the cache, and can find out what others ask by how
    fast an answer begins. Without, nobody shares."""
    priority: Priority = 0
    """The most urgent its requests may ask for; the lower goes first."""


class RedisConfig(Section):
    """State that several routers share (docs/routers.md). Without a url each is on its own."""

    url: Annotated[SecretStr, Field(min_length=9)] | None = None
    """redis://[[user]:password@]host[:port][/db], rediss:// for TLS."""
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "pdserve"
    """Before every key: routers of one namespace share engines and tenants."""

    @field_serializer("url")
    def _hide_url(self, url: SecretStr | None, info: SerializationInfo) -> str | None:
        return shown(url, info) if url else None


class IdempotencyConfig(Section):
    """Requests with an `Idempotency-Key`: a client that asks again gets the one answer."""

    keep: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after its end for which an answer is kept."""
    max_answers: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Answers one router keeps in its memory; of more, the oldest go."""


class LimitsConfig(Section):
    """What one client may ask for."""

    max_body_bytes: Annotated[ByteSize, Field(ge=1024)] = ByteSize(4 * 2**20)
    max_chat_tokens: Positive = 1024
    """Longest chat answer when the request names no max_tokens."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from a request's arrival to its last token, queueing included."""
