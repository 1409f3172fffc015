"""What the scaler asks of gateways."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """bypass_below: as in core.cluster.ClusterState. patience: seconds a new request waits for an engine where there is
    none, because one will be started for it; 0: it is told so at once."""

    bypass_below: int = 0
    patience: float = 0.0
