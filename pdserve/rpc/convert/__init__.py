"""Messages of protos/pdserve/v1/engine.proto ↔ core types. The only package that knows both.

Every `…_from_proto` takes whatever a peer can send and raises PdserveError for what is no such value:
InvalidRequest where it is a client's, MalformedMessage otherwise.
"""

from pdserve.rpc.convert.handoffs import (
    done_from_proto,
    done_to_proto,
    gone_from_proto,
    gone_to_proto,
    part_from_proto,
    part_to_proto,
    parts_from_proto,
    peer_from_proto,
    peer_to_proto,
    region_from_proto,
    region_to_proto,
    shard_from_proto,
    shard_to_proto,
    ticket_from_proto,
    ticket_to_proto,
)
from pdserve.rpc.convert.reports import (
    capacity_from_proto,
    endpoint_from_proto,
    endpoint_to_proto,
    kv_events_from_proto,
    kv_events_to_proto,
    kv_snapshot_from_proto,
    kv_snapshot_to_proto,
    load_from_proto,
    load_to_proto,
)
from pdserve.rpc.convert.requests import (
    delta_from_proto,
    delta_to_proto,
    request_from_proto,
    request_to_proto,
    trace_from_proto,
    trace_to_proto,
)

__all__ = [
    "capacity_from_proto",
    "delta_from_proto",
    "delta_to_proto",
    "done_from_proto",
    "done_to_proto",
    "endpoint_from_proto",
    "endpoint_to_proto",
    "gone_from_proto",
    "gone_to_proto",
    "kv_events_from_proto",
    "kv_events_to_proto",
    "kv_snapshot_from_proto",
    "kv_snapshot_to_proto",
    "load_from_proto",
    "load_to_proto",
    "part_from_proto",
    "part_to_proto",
    "parts_from_proto",
    "peer_from_proto",
    "peer_to_proto",
    "region_from_proto",
    "region_to_proto",
    "request_from_proto",
    "request_to_proto",
    "shard_from_proto",
    "shard_to_proto",
    "ticket_from_proto",
    "ticket_to_proto",
    "trace_from_proto",
    "trace_to_proto",
]
