"""The Kubernetes API, for whoever scales there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pdserve.config.schema import Config
from pdserve.core.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.cluster.k8s.client import KubeClient


@contextmanager
def open_kubernetes(config: Config) -> "Iterator[KubeClient]":
    """Closed at the end. Raises ConfigError without the extra k8s, or without a cluster."""
    try:
        from pdserve.cluster.k8s.client import open_client
    except ModuleNotFoundError as error:
        raise ConfigError(f"scaling on Kubernetes needs {error.name}: pip install 'pdserve[k8s]'") from error
    client = open_client(config.scaler.kubernetes.namespace, answer=config.times.kubernetes_answer)
    try:
        yield client
    finally:
        client.close()
