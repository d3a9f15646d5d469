"""Servers that no one can fill: a thread for each of a few connections, none for the silent."""

import http.server
import socketserver
import sys
import threading
from typing import Any

CONNECTIONS = 64
SECONDS_TO_ASK = 10.0
"""A connection that says nothing for so long is closed; ``timeout`` of a handler."""


class FewThreads(socketserver.ThreadingMixIn):
    """Mixed into a server: who comes when all threads are taken is sent away."""

    daemon_threads = True
    request_queue_size = 2 * CONNECTIONS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments, **named)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, or close it."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)  # type: ignore[attr-defined]  # the server has it

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer in a thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless it is that the other side went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[misc]


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Mixed into a handler: it says nothing of every request, and waits for none for long."""

    timeout = SECONDS_TO_ASK

    def log_message(self, format: str, *words: object) -> None:
        """Say nothing."""
