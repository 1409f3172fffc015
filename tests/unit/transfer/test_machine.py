"""What the kernel counts: bytes over this process's TCP sockets."""

import socket

from pdserve.transfer.machine import machine_facts, wire_bytes

NUM_BYTES = 3_000_000


def test_bytes_received_over_tcp_are_counted_and_others_are_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        local, peer = socket.socketpair()
        with receiver, local, peer:
            before = wire_bytes()
            local.sendall(bytes(1000))
            sender.settimeout(10)
            receiver.settimeout(10)
            received = 0
            while received < NUM_BYTES:
                sender.sendall(bytes(100_000))
                got = 0
                while got < 100_000:
                    got += len(receiver.recv(100_000))
                received += got
            grown = wire_bytes().tcp - before.tcp
    assert grown == received


def test_a_machine_is_named_by_its_boot() -> None:
    facts = machine_facts()
    assert facts == machine_facts()
    assert len(facts.boot_id) == 36
    assert dict(facts.versions)["pdserve"]
