"""What a scaler asks of the Kubernetes API, all of it; the chart's Roles grant no more."""

from typing import NamedTuple


class Right(NamedTuple):
    """As in a rule of a Role; the core group is ""."""

    group: str
    resource: str
    verb: str


SCALER_RIGHTS = frozenset(
    {
        Right("", "events", "create"),
        Right("", "pods", "list"),
        Right("apps", "deployments/scale", "get"),
        Right("apps", "deployments/scale", "patch"),
        Right("apps", "statefulsets/scale", "get"),
        Right("apps", "statefulsets/scale", "patch"),
        Right("coordination.k8s.io", "leases", "create"),
        Right("coordination.k8s.io", "leases", "get"),
        Right("coordination.k8s.io", "leases", "update"),
        Right("leaderworkerset.x-k8s.io", "leaderworkersets/scale", "get"),
        Right("leaderworkerset.x-k8s.io", "leaderworkersets/scale", "patch"),
        Right("ray.io", "rayclusters", "get"),
        Right("ray.io", "rayclusters", "patch"),
    }
)
"""Of `pdserve scale`. Rights on a kind of object are needed only where such objects hold pods."""

NODE_RIGHTS = frozenset(right for right in SCALER_RIGHTS if right.resource not in ("events", "leases"))
"""Of `pdserve serve` with policies, where the number of Ray nodes follows that of engines."""
