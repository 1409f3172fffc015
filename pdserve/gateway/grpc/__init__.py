"""The public gRPC API: protos/pdserve/v1/inference.proto, standard health and reflection."""
