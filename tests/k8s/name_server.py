"""A name server for the Services of a cluster, in place of CoreDNS: python -m tests.k8s.name_server KUBECONFIG ADDRESS.

A headless Service has the addresses of its Endpoints, any other its cluster IP. It answers what was so up to REFRESH
seconds ago, as CoreDNS does with what it remembers. A records only, over UDP.
"""

import socket
import struct
import sys
import threading
import time
from typing import Any

ZONE = "svc.cluster.local"
REFRESH = 5.0
_A = 1
_OK, _NO_SUCH_NAME = 0, 3

Names = dict[str, list[str]]


def names_of(services: list[Any], endpoints: list[Any]) -> Names:
    """Names (without a final dot) with their addresses, of the API's objects."""
    names: Names = {}
    for service in services:
        name = f"{service.metadata.name}.{service.metadata.namespace}.{ZONE}"
        names[name] = [] if service.spec.cluster_ip == "None" else [service.spec.cluster_ip]
    for found in endpoints:
        name = f"{found.metadata.name}.{found.metadata.namespace}.{ZONE}"
        if names.get(name) == []:
            names[name] = [address.ip for subset in found.subsets or [] for address in subset.addresses or []]
    return names


def answer(query: bytes, names: Names) -> bytes:
    """To one question (RFC 1035, section 4)."""
    labels, end = [], 12
    while length := query[end]:
        labels.append(query[end + 1 : end + 1 + length].decode("ascii").lower())
        end += 1 + length
    (kind,) = struct.unpack_from("!H", query, end + 1)
    name = ".".join(labels)
    addresses = names.get(name, []) if kind == _A else []
    flags = 0x8580 | (_OK if name in names else _NO_SUCH_NAME)
    header = query[:2] + struct.pack("!HHHHH", flags, 1, len(addresses), 0, 0)
    records = [struct.pack("!HHHIH4s", 0xC00C, _A, 1, int(REFRESH), 4, socket.inet_aton(ip)) for ip in addresses]
    return header + query[12 : end + 5] + b"".join(records)


class _Names:
    """Those of the cluster. What was known stands while the API does not answer."""

    def __init__(self, kubeconfig: str) -> None:
        from kubernetes import client, config  # the extra k8s

        self._core = client.CoreV1Api(config.new_client_from_config(kubeconfig))
        self.known = self._ask()

    def _ask(self) -> Names:
        services = self._core.list_service_for_all_namespaces().items
        return names_of(services, self._core.list_endpoints_for_all_namespaces().items)

    def keep_asking(self) -> None:
        while True:
            time.sleep(REFRESH)
            try:
                self.known = self._ask()
            except Exception as error:  # whatever the client raises: it is asked again
                print(f"the API does not answer: {error!r}", flush=True)


def main(kubeconfig: str, address: str) -> None:
    names = _Names(kubeconfig)
    threading.Thread(target=names.keep_asking, daemon=True).start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        while True:
            query, peer = server.recvfrom(512)
            try:
                server.sendto(answer(query, names.known), peer)
            except (IndexError, struct.error, UnicodeDecodeError) as error:
                print(f"no question: {error!r}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
