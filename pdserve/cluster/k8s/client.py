"""The Kubernetes API as far as a scaler needs it: `rights` lists all that is asked here. Answers are plain JSON."""

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from pdserve.cluster.k8s.target import Held, Target, held
from pdserve.core.errors import ConfigError, Conflict, Denied, PdserveError, Unavailable

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_THREADS = 8
"""Calls at a time: a lease is renewed while other calls wait for an answer."""
_MARGIN = 0.5
"""Seconds: a call is given up by its own thread first."""
_JSON_PATCH = "application/json-patch+json"

Json = dict[str, Any]


class KubeClient:
    """One namespace. The library blocks, so each call has a thread, and `answer` seconds. Every method raises Denied,
    Conflict, or Unavailable when there is no answer or none of use."""

    def __init__(self, api: Any, namespace: str, *, answer: float) -> None:
        """api: kubernetes.client.ApiClient."""
        self.namespace = namespace
        self._leases = ("coordination.k8s.io", "v1", namespace, "leases")
        self._api = api
        self._answer = answer
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kubernetes")
        self._core = client.CoreV1Api(api)
        self._objects = client.CustomObjectsApi(api)
        """Of any group. The library's own kinds would reformat times: a Lease's need six digits."""

    async def look(self, target: Target) -> Held:
        read = self._objects.get_namespaced_custom_object
        if target.has_scale:
            read = self._objects.get_namespaced_custom_object_scale
        found = held(target, await self._call(f"reading {target}", read, *self._place(target)))
        if found is None:
            raise Unavailable(f"RayCluster {target.name} has no worker group {target.group}")
        if not found.selector:  # which would name every pod of the namespace
            raise Unavailable(f"{target} does not say yet which pods are its own")
        return found

    async def scale(self, target: Target, replicas: int, *, place: int = 0, leaving: Sequence[str] = ()) -> None:
        """place: of the worker group, as Held has it. leaving: its pods that go first; the other kinds choose
        themselves. Raises Conflict when the object was changed meanwhile."""
        if target.has_scale:
            patch, changes = self._objects.patch_namespaced_custom_object_scale, [_put("/spec/replicas", replicas)]
        else:
            patch = self._objects.patch_namespaced_custom_object
            path = f"/spec/workerGroupSpecs/{place}"
            changes = [{"op": "test", "path": f"{path}/groupName", "value": target.group}]
            changes += [_put(f"{path}/scaleStrategy", {"workersToDelete": list(leaving)})] if leaving else []
            changes += [_put(f"{path}/replicas", replicas)]
        await self._call(f"scaling {target}", patch, *self._place(target), changes, _content_type=_JSON_PATCH)

    async def pods(self, selector: str) -> Sequence[Json]:
        list_pods = partial(self._core.list_namespaced_pod, self.namespace, resource_version="0")
        answer = await self._call("listing pods", list_pods, label_selector=selector)
        return answer.get("items") or []

    async def lease(self, name: str) -> Json | None:
        """None when there is none."""
        read = self._objects.get_namespaced_custom_object
        try:
            return await self._call(f"reading Lease {name}", read, *self._leases, name)
        except _NotFound:
            return None

    async def create_lease(self, body: Json) -> Json:
        create = self._objects.create_namespaced_custom_object
        return await self._call(f"creating Lease {body['metadata']['name']}", create, *self._leases, body)

    async def replace_lease(self, body: Json) -> Json:
        """Raises Conflict unless it is as when the body's resourceVersion was read."""
        name = body["metadata"]["name"]
        replace = self._objects.replace_namespaced_custom_object
        return await self._call(f"renewing Lease {name}", replace, *self._leases, name, body)

    async def create_event(self, body: Json) -> None:
        create = partial(self._core.create_namespaced_event, self.namespace)
        await self._call("writing an Event", create, body)

    def close(self) -> None:
        """Calls that run end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _place(self, target: Target) -> tuple[str, ...]:
        return (*target.group_version, self.namespace, target.resource, target.name)

    async def _call(self, doing: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Json:
        ask = partial(_ask, method, *arguments, _preload_content=False, _request_timeout=self._answer, **named)
        try:
            async with asyncio.timeout(self._answer + _MARGIN):
                return await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        except ApiException as error:
            raise _refusal(doing, error) from None
        except (HTTPError, OSError, TimeoutError, json.JSONDecodeError) as error:
            raise Unavailable(f"{doing}: the Kubernetes API server does not answer ({type(error).__name__})") from None


def _put(path: str, value: Any) -> Json:
    """Whether it was there before or, as zero replicas, left out."""
    return {"op": "add", "path": path, "value": value}


class _NotFound(Unavailable):
    """There is no such object."""


def _ask(method: Callable[..., Any], *arguments: Any, **named: Any) -> Json:
    answer: Json = json.loads(method(*arguments, **named).data)
    return answer


def _refusal(doing: str, error: ApiException) -> PdserveError:
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.reason or "no reason given"
    match error.status:
        case 401 | 403:
            return Denied(f"{doing} is not allowed; does the Role of the service account grant it? {said}")
        case 409 | 422:
            return Conflict(f"{doing}: {said}")
        case 404:
            return _NotFound(f"{doing}: {said}")
        case status:
            return Unavailable(f"{doing}: the Kubernetes API server answered {status}: {said}")


def open_client(namespace: str | None, *, answer: float, env: Mapping[str, str] = os.environ) -> KubeClient:
    """By the pod's service account, or elsewhere by KUBECONFIG's context. Raises ConfigError when neither will do."""
    settings = client.Configuration()
    settings.retries = False
    try:
        if "KUBERNETES_SERVICE_HOST" in env:
            config.load_incluster_config(client_configuration=settings)
            own = _NAMESPACE_FILE.read_text(encoding="ascii").strip()
        else:
            config.load_kube_config(client_configuration=settings)
            own = config.list_kube_config_contexts()[1]["context"].get("namespace", "")
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            f"no Kubernetes cluster: {error}; run this in a pod with a service account token, or set KUBECONFIG"
        ) from None
    if not (namespace or own):
        raise ConfigError("scaler.kubernetes.namespace: must be given where the kubeconfig's context names none")
    return KubeClient(client.ApiClient(settings), namespace or own, answer=answer)
