"""Ports for those that cannot choose one themselves."""

import random
import socket

_NOBODYS = range(20_000, 30_000)
"""Below those that a system hands out: nobody gets one by chance between its choice and its use."""


def free_port() -> int:
    """A port on which nobody listens."""
    while True:
        port = random.SystemRandom().choice(_NOBODYS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
