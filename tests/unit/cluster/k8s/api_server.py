"""An API server that keeps a few objects, notes what it is asked, and fails when it is told to."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubernetes import client

from pdserve.cluster.k8s.client import KubeClient
from pdserve.cluster.k8s.pods import GROUP_LABEL, INDEX_LABEL
from pdserve.cluster.k8s.rights import Right
from pdserve.cluster.k8s.target import SET_LABEL

NAMESPACE = "test"
_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/v1)/namespaces/test/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?P<sub>/scale)?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}

Json = dict[str, Any]


class ApiServer:
    """Of the namespace NAMESPACE. Pods are those in `pods`; with `makes_pods`, what is scaled has as many ready ones
    as it asks for, or groups of two if it is a LeaderWorkerSet."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: Counter[Right] = Counter()
        self.objects: dict[tuple[str, str], Json] = {}
        self.pods: list[Json] = []
        self.events: list[Json] = []
        self.failures: dict[str, list[int]] = {}
        """Verb → statuses of the next answers to it; 0: none at all, until `released`."""
        self.released = threading.Event()
        self.makes_pods = False
        self._lock = threading.Lock()
        self._version = 0

    def add_scale(self, resource: str, name: str, replicas: int) -> None:
        """resource: statefulsets, deployments or leaderworkersets."""
        metadata = {"name": name, "uid": f"uid-{name}"}
        status = {"selector": f"pool={name}"}
        spec = {"replicas": replicas} if replicas else {}
        self.objects[resource, name] = {"metadata": metadata, "spec": spec, "status": status}

    def add_ray_cluster(self, name: str, **groups: int) -> None:
        specs = [{"groupName": group, "replicas": replicas} for group, replicas in groups.items()]
        metadata = {"name": name, "uid": f"uid-{name}"}
        self.objects["rayclusters", name] = {"metadata": metadata, "spec": {"workerGroupSpecs": specs}}

    def replicas(self, resource: str, name: str) -> int:
        return _replicas(self.objects[resource, name])

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Json]:
        parts = urlsplit(url)
        found = _PATH.fullmatch(parts.path)
        if found is None:
            return 404, _status(404, parts.path)
        resource, name = found["resource"], found["name"] or ""
        verb = _VERBS.get(method, "get" if name else "list")
        with self._lock:
            self.asked[Right(found["group"] or "", resource + (found["sub"] or ""), verb)] += 1
            failure = self.failures.get(verb) or [200]
            status = failure.pop(0)
        if status == 0:
            self.released.wait(30)
        if status != 200:
            return status or 503, _status(status, f"{verb} {resource} of {name}")
        with self._lock:
            return self._done(verb, resource, name, body, parse_qs(parts.query))

    def _done(self, verb: str, resource: str, name: str, body: Any, query: dict[str, list[str]]) -> tuple[int, Json]:
        if verb == "list":
            return 200, {"items": self._pods(query["labelSelector"][0])}
        if resource == "events":
            self.events.append(body)
            return 201, body
        key = resource, name or body["metadata"]["name"]
        before = self.objects.get(key)
        if verb == "create":
            return (409, _status(409, "exists")) if before else (201, self._keep(key, body))
        if before is None:
            return 404, _status(404, f"{resource} {name} not found")
        if verb == "get":
            return 200, before
        if verb == "update":
            stale = body["metadata"].get("resourceVersion") != before["metadata"]["resourceVersion"]
            return (409, _status(409, "changed")) if stale else (200, self._keep(key, body))
        after = _patched(before, body)
        return (200, self._keep(key, after)) if after else (422, _status(422, "a test failed"))

    def _keep(self, key: tuple[str, str], body: Json) -> Json:
        self._version += 1
        metadata = {**body["metadata"], "resourceVersion": str(self._version)}
        self.objects[key] = {**body, "metadata": metadata}
        return self.objects[key]

    def _pods(self, selector: str) -> list[Json]:
        labels = dict(part.split("=") for part in selector.split(","))
        if not self.makes_pods:
            return [pod for pod in self.pods if labels.items() <= pod["metadata"]["labels"].items()]
        (value,) = labels.values()
        numbers = [n for (_, name), each in self.objects.items() if name == value for n in range(_replicas(each))]
        if SET_LABEL in labels:
            return [each for number in numbers for each in group(number, value)]
        return [pod(f"{value}-{n}", value) for n in numbers]


def pod(name: str, pool: str, *, ip: str = "", phase: str = "Running", deleted: bool = False, **status: Any) -> Json:
    """A ready one, unless its status says otherwise."""
    ready = [{"type": "Ready", "status": "True"}]
    metadata: Json = {"name": name, "labels": {"pool": pool}}
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "status": {"phase": phase, "podIP": ip, "conditions": ready, **status}}


def group(number: int, pool: str) -> list[Json]:
    """The ready pods of an engine on two hosts, its leader first."""
    leader, host = pod(f"{pool}-{number}", pool), pod(f"{pool}-{number}-1", pool)
    for index, each in enumerate((leader, host)):
        own = {SET_LABEL: pool, GROUP_LABEL: str(number), INDEX_LABEL: str(index)}
        each["metadata"]["labels"] |= own
    return [leader, host]


def unschedulable(name: str, pool: str) -> Json:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    return pod(name, pool, phase="Pending", conditions=[condition])


def starting(name: str, pool: str) -> Json:
    return pod(name, pool, phase="Pending", conditions=[{"type": "Ready", "status": "False"}])


def _replicas(holder: Json) -> int:
    found: int = holder["spec"].get("replicas", 0)
    return found


def _patched(before: Json, changes: list[Json]) -> Json | None:
    """By a JSON patch of adds and tests; None when a test fails."""
    after = deepcopy(before)
    for change in changes:
        *path, last = [int(part) if part.isdecimal() else part for part in change["path"].split("/")[1:]]
        place: Any = after
        for part in path:
            place = place[part]
        if change["op"] == "test" and place[last] != change["value"]:
            return None
        place[last] = change["value"]
    return after


def _status(status: int, message: str) -> Json:
    return {"kind": "Status", "code": status, "message": message}


@contextmanager
def serving(answer: float = 30.0) -> Iterator[tuple[ApiServer, KubeClient]]:
    """An API server and a client of it that waits so many seconds for an answer."""
    api = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = api.answer(self.command, self.path, body)
            if self.command == "PATCH" and self.headers["Content-Type"] != "application/json-patch+json":
                status, answer = 415, _status(415, "a list of changes is a JSON patch")
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = _serve

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    api.url = f"http://127.0.0.1:{server.server_port}"
    settings = client.Configuration(host=api.url)
    settings.retries = False
    api_client = client.ApiClient(settings)
    kube = KubeClient(api_client, NAMESPACE, answer=answer)
    try:
        yield api, kube
    finally:
        api.released.set()
        kube.close()
        api_client.close()
        server.shutdown()
        server.server_close()
