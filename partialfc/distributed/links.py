"""Connections of each rank with a few others, by which all learn what one knows.

In round k a rank tells what it knows to the one 2^k places on, and hears the one 2^k places back.
After ceil(log2 W) rounds each has heard of all (a dissemination barrier: Hensgen, Finkel, Manber,
1988). That is 12 messages a rank among 4,096, one after the other, where a ring takes 8,190; and 24
descriptors, where a gloo group takes 4,095 and each rank reads the addresses of all for that.

It is for what is no tensor: a flag, the words of an error. A thread may use connections of its own
beside the training, since no collective is entered.
"""

import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist

from partialfc.distributed.agreement import collective_device, words_of_any
from partialfc.distributed.ranks import Ranks, gather_rows

_TOKEN_BYTES = 16
_PLACE = struct.Struct(f"<46sH{_TOKEN_BYTES}s")
"""An address in letters, of IPv6 at most 46 of them; its port; what a caller must know."""
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")
"""The token of the rank that is called, and who calls."""
_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 16
"""Of a message: words are cut to it."""
_SECONDS_TO_MEET = 120.0
_SECONDS_TO_GREET = 5.0
"""Whoever calls says who it is within them, or is no rank."""


def rounds(size: int) -> int:
    """How many messages a rank sends until all know what one knew: ceil(log2 W)."""
    return (size - 1).bit_length()


class Links:
    """This rank's connections; one thread may use them. Collective: one all-gather of 64 bytes, and
    one all-reduce.

    Args:
        ranks: This rank among all.
        address: By which the others reach this host.
        seconds: How much later than this rank another may come to an agreement.

    Raises:
        OSError: On every rank, if one cannot reach those that it is to be linked with.
    """

    def __init__(self, ranks: Ranks, address: str = "127.0.0.1", seconds: float = 7200.0) -> None:
        self._ranks, self._seconds = ranks, seconds
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
            every = _of_all(_Place(host, port, token), ranks)
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

    def __enter__(self) -> "Links":
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

    def any(self, own: bool) -> bool:
        """Whether it is true on any rank. ceil(log2 W) messages of 5 bytes from each rank."""
        return self._spread(bytes([own]), max) != b"\0"

    def words_of_any(self, own: str) -> str:
        """Return on every rank the words of the lowest rank that has any, or "" if none has.

        ceil(log2 W) messages from each rank, as long as the words.
        """

        def first(one: bytes, other: bytes) -> bytes:
            return min(filter(None, (one, other)), default=b"")

        words = own.encode(errors="replace")[: _MOST_BYTES - 4]
        number = self._ranks.rank.to_bytes(4, "big")
        return self._spread(number + words if words else b"", first)[4:].decode(errors="replace")

    def union(self, own: Set[bytes], width: int) -> frozenset[bytes]:
        """Return what any rank has, at most 64 KiB of it: the first in order.

        ceil(log2 W) messages from each rank, as long as what is known so far.

        Args:
            own: Of this rank.
            width: Bytes of each.
        """

        def cut(joined: bytes) -> set[bytes]:
            return {joined[at : at + width] for at in range(0, len(joined), width)}

        def join(one: bytes, other: bytes) -> bytes:
            return b"".join(sorted(cut(one + other))[: _MOST_BYTES // width])

        return frozenset(cut(self._spread(join(b"".join(own), b""), join)))

    def _spread(self, known: bytes, join: Callable[[bytes, bytes], bytes]) -> bytes:
        """Join what all ranks know; some is heard twice where W is no power of 2.

        Raises:
            dist.DistNetworkError: If a rank that this one waits for is gone, or does not come.
        """
        distance = 1
        for to, from_ in zip(self._to, self._from, strict=True):
            rank = self._ranks.rank + distance
            try:
                to.sendall(_LENGTH.pack(len(known)) + known)
                rank = self._ranks.rank - distance
                known = join(known, _message(from_))
            except OSError as error:
                raise dist.DistNetworkError(
                    f"rank {rank % self._ranks.size} or one that it waits for is gone: {error}"
                ) from error
            distance *= 2
        return known

    def _meet(self, listener: socket.socket, token: bytes, every: Sequence["_Place"]) -> None:
        """Call the ranks on the way on, and wait for those back.

        A call is complete before it is taken, so nobody waits in a circle.
        """
        ranks = self._ranks
        distances = [1 << number for number in range(rounds(ranks.size))]
        until = time.monotonic() + _SECONDS_TO_MEET
        for distance in distances:
            called = _call(every[(ranks.rank + distance) % ranks.size], ranks.rank)
            self._to.append(_tuned(called, self._seconds))
        expected = [(ranks.rank - distance) % ranks.size for distance in distances]
        came: dict[int, socket.socket] = {}
        while len(came) < len(expected):
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                caller, _ = listener.accept()
            except TimeoutError as error:
                missing = next(rank for rank in expected if rank not in came)
                raise OSError(f"rank {missing} did not call") from error
            number = _greeted(caller, token)
            if number in expected and number not in came:
                came[number] = _tuned(caller, self._seconds)
                self._from.append(came[number])
            else:
                caller.close()
        self._from = [came[rank] for rank in expected]


@contextmanager
def any_rank(known: Callable[[], bool], links: Links) -> Iterator[Callable[[], bool]]:
    """Return a function for the end of every step: whether ``known()`` was true on any rank.

    It answers the same on every rank, one call late: a call asks the others, which a thread does
    beside the next step, and returns the answer to the call before. Neither a GPU nor a collective
    takes part. :meth:`Links.any` per call.
    """
    if links.size == 1:
        yield known
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="flag")
    pending: Future[bool] | None = None

    def agreed() -> bool:
        nonlocal pending
        answer = pending is not None and pending.result()
        pending = pool.submit(links.any, known())
        return answer

    try:
        yield agreed
        if pending is not None:
            pending.result()
    finally:
        pool.shutdown(wait=False)  # who closes the links ends what still waits


def _listening(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.bind((address, 0))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


class _Place(NamedTuple):
    """Where a rank listens; port 0 if it cannot."""

    host: str
    port: int
    token: bytes


def _of_all(own: _Place, ranks: Ranks) -> list[_Place]:
    """The places of all ranks: one all-gather."""
    packed = bytearray(_PLACE.pack(own.host.encode(), own.port, own.token))
    row = torch.frombuffer(packed, dtype=torch.uint8).unsqueeze(0)
    rows = gather_rows(row.to(collective_device(ranks)), ranks).cpu()  # host sync
    every = map(_PLACE.unpack, rows.numpy())
    return [_Place(host.rstrip(b"\0").decode(), port, token) for host, port, token in every]


def _call(place: _Place, own: int) -> socket.socket:
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
        known, rank = _HELLO.unpack(_exactly(caller, _HELLO.size))
        if secrets.compare_digest(known, token):
            return int(rank)
    return None


def _tuned(one: socket.socket, seconds: float) -> socket.socket:
    one.settimeout(seconds)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # A whole message has room on its way, so no circle of ranks waits to be rid of theirs.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
    return one


def _message(from_: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(from_, _LENGTH.size))
    if length > _MOST_BYTES:
        raise OSError(f"a message of {length:,} bytes")
    return _exactly(from_, length)


def _exactly(from_: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = from_.recv(count - len(parts))
        if not part:
            raise ConnectionError("it closed its connection")
        parts += part
    return bytes(parts)
