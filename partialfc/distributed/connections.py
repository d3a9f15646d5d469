"""Connections of each rank with some others, by sockets.

They are for what no collective carries: a word beside the training, bytes between two ranks. All
ranks make them together, and each says beforehand whom it calls and who calls it.
"""

import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import NamedTuple, Self

import torch

from partialfc.distributed.agreement import collective_device, words_of_any
from partialfc.distributed.ranks import Ranks, gather_rows

_TOKEN_BYTES = 16
_PLACE = struct.Struct(f"<46sH{_TOKEN_BYTES}s")
"""An address in letters, of IPv6 at most 46 of them; its port; what a caller must know."""
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")
"""The token of the rank that is called, and who calls."""
_SECONDS_TO_MEET = 120.0
_SECONDS_TO_GREET = 5.0
"""Whoever calls says who it is within them, or is no rank."""
_CALLS_AT_ONCE = 1024
"""That wait to be taken; the system may have less."""


class Place(NamedTuple):
    """Where a rank listens; port 0 if it cannot."""

    host: str
    port: int
    token: bytes


class Connections:
    """This rank's connections. Collective: one all-gather of 64 bytes, and one all-reduce.

    Args:
        ranks: This rank among all.
        called: Those that this rank calls, each of which expects it.
        expected: Those that call this rank.
        address: By which the others reach this host.
        seconds: How long this rank waits for another.

    Raises:
        OSError: On every rank, if one cannot reach those that it is to be connected with.
    """

    _send_buffer: int | None = None
    """Bytes that are on their way while nobody reads them; ``None`` leaves that to the system."""

    def __init__(
        self,
        ranks: Ranks,
        called: Sequence[int],
        expected: Sequence[int],
        address: str,
        seconds: float,
    ) -> None:
        self._ranks, self._seconds = ranks, seconds
        self._called, self._expected = [*called], [*expected]
        self._to: list[socket.socket] = []
        self._from: list[socket.socket] = []
        if ranks.size == 1:
            return
        problem, token = "", secrets.token_bytes(_TOKEN_BYTES)
        with ExitStack() as stack:
            listener, host, port = None, "", 0
            try:
                listener = stack.enter_context(_listening(address))
                host, port = listener.getsockname()[:2]
            except OSError as error:
                problem = f"rank {ranks.rank} cannot listen on {address}: {error}"
            every = _of_all(Place(host, port, token), ranks)
            if listener is not None and all(place.port for place in every):
                try:
                    self._meet(listener, token, every)
                except OSError as error:
                    problem = f"rank {ranks.rank}: {error}"
        if problem := words_of_any(problem, ranks):
            self.close()
            raise OSError(
                f"ranks do not reach one another: {problem}. Set GLOO_SOCKET_IFNAME to the "
                "interface of the network between the hosts, and open its ports among them."
            )

    @property
    def size(self) -> int:
        """World size."""
        return self._ranks.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections: who still waits for this rank finds that it is gone."""
        for one in (*self._to, *self._from):
            with suppress(OSError):  # also wakes a thread of this rank that waits
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._to, self._from = [], []

    def _meet(self, listener: socket.socket, token: bytes, every: Sequence[Place]) -> None:
        """Call some ranks, and wait for others.

        A call is complete before it is taken, so nobody waits in a circle.
        """
        until = time.monotonic() + _SECONDS_TO_MEET
        for rank in self._called:
            self._to.append(self._tuned(_call(every[rank], self._ranks.rank)))
        came: dict[int, socket.socket] = {}
        while len(came) < len(self._expected):
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                caller, _ = listener.accept()
            except TimeoutError as error:
                missing = next(rank for rank in self._expected if rank not in came)
                raise OSError(f"rank {missing} did not call") from error
            number = _greeted(caller, token)
            if number in self._expected and number not in came:
                came[number] = self._tuned(caller)
                self._from.append(came[number])
            else:
                caller.close()
        self._from = [came[rank] for rank in self._expected]

    def _tuned(self, one: socket.socket) -> socket.socket:
        one.settimeout(self._seconds)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._send_buffer is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        return one


def _listening(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.bind((address, 0))
        listener.listen(_CALLS_AT_ONCE)
    except OSError:
        listener.close()
        raise
    return listener


def _of_all(own: Place, ranks: Ranks) -> list[Place]:
    """The places of all ranks: one all-gather."""
    packed = bytearray(_PLACE.pack(own.host.encode(), own.port, own.token))
    row = torch.frombuffer(packed, dtype=torch.uint8).unsqueeze(0)
    rows = gather_rows(row.to(collective_device(ranks)), ranks).cpu()  # host sync
    every = map(_PLACE.unpack, rows.numpy())
    return [Place(host.rstrip(b"\0").decode(), port, token) for host, port, token in every]


def _call(place: Place, own: int) -> socket.socket:
    try:
        called = socket.create_connection((place.host, place.port), timeout=_SECONDS_TO_MEET)
        called.sendall(_HELLO.pack(place.token, own))
    except OSError as error:
        raise OSError(f"{place.host} port {place.port} cannot be reached: {error}") from error
    return called


def _greeted(caller: socket.socket, token: bytes) -> int | None:
    """The rank that calls, if it knows the token of this one."""
    caller.settimeout(_SECONDS_TO_GREET)
    with suppress(OSError):
        known, rank = _HELLO.unpack(filled(caller, bytearray(_HELLO.size)))
        if secrets.compare_digest(known, token):
            return int(rank)
    return None


def filled(from_: socket.socket, into: bytearray | memoryview) -> bytearray | memoryview:
    """Return memory that is filled with what comes.

    Raises:
        OSError: If the other one is gone, or does not come.
    """
    view = memoryview(into)
    while view:
        count = from_.recv_into(view)
        if not count:
            raise ConnectionError("it closed its connection")
        view = view[count:]
    return into
