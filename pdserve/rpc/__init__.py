"""gRPC plumbing: generated code, conversion between messages and core types, channel settings."""

import os

# gRPC prints every connection a peer closes; our own logs say what matters. Read at grpc's import.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
