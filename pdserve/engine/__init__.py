"""One engine: the scheduler, its sequences, the KV handoff to and from other engines, its gRPC server."""
