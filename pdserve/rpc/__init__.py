"""gRPC plumbing: generated code, conversion between messages and core types, channel settings."""
