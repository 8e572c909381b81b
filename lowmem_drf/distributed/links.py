"""Connections between the processes of a run, beside those of ``torch.distributed``: messages of rank 0 with every
other one.

A process that ends, however it ends, closes its connections: the kernel does it. That is seen at once, where a
heartbeat would take a process that pins 20 GiB of memory for a dead one. Of a machine that loses power TCP keepalive
tells after ``KEEP_IDLE_S + KEEP_TRIES * KEEP_EVERY_S``.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import Any

from lowmem_drf.distributed.ranks import Ranks
from lowmem_drf.errors import LowmemError

CONNECT_S = 60.0
GREET_S = 5.0
KEEP_IDLE_S, KEEP_EVERY_S, KEEP_TRIES = 10, 3, 4
LONGEST = 1 << 20
"""Bytes of a message: a traceback is some kilobytes."""

Message = dict[str, Any]


class Link:
    """One connection. After the greeting each side says at most one thing: a line of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(GREET_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", KEEP_IDLE_S),
            ("TCP_KEEPINTVL", KEEP_EVERY_S),
            ("TCP_KEEPCNT", KEEP_TRIES),
        ):
            if hasattr(socket, name):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: object) -> None:
        """Nothing is said if nobody is there any more: whoever listens learns that from ``receive``."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message:
        """What the other side says. Raises OSError or EOFError where it is gone, ValueError where it speaks
        otherwise."""
        line = b""
        while not line.endswith(b"\n"):
            # no more than this line: what follows belongs to the next call, and to ``select``
            byte = self.connection.recv(1)
            if not byte or len(line) > LONGEST:
                raise EOFError
            line += byte
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def close(self) -> None:
        self.connection.close()


def connect(ranks: Ranks) -> tuple[dict[int, Link], str]:
    """By rank: of rank 0 the links to all others, of the others that to rank 0; and the run's token. A collective.

    Connections are of this run only: they prove it with the token, which went over the process group.

    Raises:
        LowmemError: some did not find each other within ``CONNECT_S``.
    """
    if ranks.chief:
        with _server(ranks) as server:
            token = secrets.token_hex(16)
            ranks.from_chief((_addresses(ranks), int(server.getsockname()[1]), token))
            return _accept(server, ranks, token), token
    nowhere: list[str] = []
    addresses, port, token = ranks.from_chief((nowhere, 0, ""))
    return {0: _reach(addresses, port, token, ranks)}, token


def _server(ranks: Ranks) -> socket.socket:
    if ranks.local_count == ranks.count:
        return socket.create_server(("127.0.0.1", 0), backlog=ranks.count)
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, backlog=ranks.count, dualstack_ipv6=both
    )


def _addresses(ranks: Ranks) -> list[str]:
    """Where rank 0 may be reached, the surest first: its own address on the way to the launcher's, which need not be on
    its machine; that; its name."""
    if ranks.local_count == ranks.count:
        return ["127.0.0.1"]
    master = os.environ["MASTER_ADDR"]
    own = []
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(
            master, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own = [probe.getsockname()[0]]
    return list(
        dict.fromkeys(
            [*(name for name in own if not name.startswith("127.") and name != "::1"), master, socket.gethostname()]
        )
    )


def _accept(server: socket.socket, ranks: Ranks, token: str) -> dict[int, Link]:
    links: dict[int, Link] = {}
    deadline = time.monotonic() + CONNECT_S
    while len(links) < ranks.count - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in range(1, ranks.count) if rank not in links)
            raise LowmemError(
                f"rank {missing} did not reach rank 0 within {CONNECT_S:.0f} s. Let the machines reach each other on every port."
            ) from None
        link = Link(connection)
        with suppress(OSError, EOFError, ValueError, KeyError, TypeError):  # whoever it was, it was none of ours
            greeting = link.receive()
            if secrets.compare_digest(greeting["token"], token):
                links[greeting["rank"]] = link
                link.send(say="welcome")
                continue
        link.close()
    return links


def _reach(addresses: list[str], port: int, token: str, ranks: Ranks) -> Link:
    deadline = time.monotonic() + CONNECT_S
    while time.monotonic() < deadline:
        for address in addresses:
            with suppress(OSError, EOFError, ValueError):  # another machine's port of that number, or none
                link = Link(socket.create_connection((address, port), timeout=GREET_S))
                link.send(token=token, rank=ranks.rank)
                if link.receive() == {"say": "welcome"}:
                    return link
                link.close()
        time.sleep(0.2)
    raise LowmemError(
        f"rank {ranks.rank} cannot reach rank 0 ({' or '.join(addresses)}, port {port}). Let the machines reach each other on every port."
    )
