"""Which engines serve a request: pure decisions over core.cluster.ClusterState."""
