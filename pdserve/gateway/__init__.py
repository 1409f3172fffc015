"""The public edge: HTTP and gRPC in front of a Generator, text in and text out."""
