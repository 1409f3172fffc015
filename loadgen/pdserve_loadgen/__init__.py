"""Load generator for OpenAI-compatible endpoints: workloads, measurement, verdict.

It knows nothing of pdserve's internals, so it measures any server; the simulator reports through `report`.
"""
