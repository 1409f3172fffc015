"""Every duration that decides something, in one place. docs/kv-transfer.md shows this table."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """All in seconds."""

    transfer_deadline: float = 10.0
    """One pull may take this long; then its destination is quarantined."""
    heartbeat: float = 1.0
    """Between two heartbeats of a session, in either direction."""
    suspect: float = 3.0
    """Silence after which an engine gets no new work and its waiting requests fail."""
    fence: float = 4.0
    """Silence after which the supervisor kills an engine, or an engine its worker process; only then is its memory
    nobody's."""
    gateway_fence: float = 10.0
    """The same for a gateway: longer, because nobody goes on with its requests."""
    lease: float = 10.0
    """A ticket's life without renewal."""
    lease_guard: float = 1.0
    """No pull starts when less than this is left of the lease."""
    release_answer: float = 2.0
    """How long a decode engine waits for the answer to Release before it discards the KV."""
    restore_deadline: float = 5.0
    """One restore from a tier may take this long; then its destination is quarantined and the prompt computed."""
    fetch_deadline: float = 3.0
    """Fetching a prompt's beginning from another engine's cache may take this long; then it is computed."""
    quarantine: float = 10.0
    """An engine with more than kv.quarantine_limit of its blocks in quarantine for so long drains and is started again:
    longer than fence, because the end of a frozen peer gives back what it held up."""
    link_backoff: float = 1.0
    """How long requests avoid a link between two engines that was lost, before one of them tries it; doubles with
    every failure in a row."""
    link_backoff_max: float = 10.0
    link_forgotten: float = 30.0
    """A decode engine stops opening a lost link again when no request has asked for it so long."""
    migration: float = 10.0
    """One running request's move to another engine may take this long; then it stays, or is replayed."""
    pair_check: float = 30.0
    """How long `pdserve doctor` waits for one pair; a source holds its test pattern no longer."""
    shared_lease: float = 4.0
    """What a router or a supervisor has noted in Redis stands so long without renewal."""
    redis_answer: float = 1.0
    """Silence after which Redis counts as lost; no request waits longer for it."""
    scaler_lease: float = 15.0
    """Without renewal, the leadership among scalers ends after so long, in whole seconds; a leader that cannot renew
    stops acting after two thirds of it."""
    kubernetes_answer: float = 5.0
    """How long one call of the Kubernetes API may take."""
    connection_age: float = 10.0
    """gRPC clients renew their connections so often (10 % more or less), their running calls left alone, because load
    balancers of connections would otherwise never bring them to other routers. A router that is told to end, and is not
    the only one, lets in whoever still comes for 1.5 times as long."""
    connection_idle: float = 6.0
    """Such a router ends HTTP connections once no request has come for so long: most clients that keep a connection use
    it again sooner or never (httpx, and with it the openai package, within 5 s)."""
    restart_backoff: float = 0.5
    """First delay before a dead engine is started again; doubles with every death in a row."""
    restart_backoff_max: float = 30.0
    restart_forgiven: float = 60.0
    """An engine that lived this long starts over with the first delay."""
    start_timeout: float = 300.0
    """From process start to READY, model loading included."""
    drain_timeout: float = 30.0
    """From Ctrl-C until what still runs is cut off; also how long one engine that drains waits for what runs there.
    What is not gone fence later is killed."""
