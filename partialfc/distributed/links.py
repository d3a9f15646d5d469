"""Connections of each rank with a few others, by which all learn what one knows.

In round k a rank tells what it knows to the one 2^k places on, and hears the one 2^k places back.
After ceil(log2 W) rounds each has heard of all (a dissemination barrier: Hensgen, Finkel, Manber,
1988). That is 12 messages a rank among 4,096, one after the other, where a ring takes 8,190; and 24
descriptors, where a gloo group takes 4,095 and each rank reads the addresses of all for that.

It is for what is no tensor: a flag, the words of an error. A thread may use connections of its own
beside the training, since no collective is entered.
"""

import socket
import struct
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch.distributed as dist

from partialfc.distributed.connections import Connections, filled
from partialfc.distributed.ranks import Ranks

_LENGTH = struct.Struct("<I")
_MOST_BYTES = 1 << 16
"""Of a message: words are cut to it."""


def rounds(size: int) -> int:
    """How many messages a rank sends until all know what one knew: ceil(log2 W)."""
    return (size - 1).bit_length()


class Links(Connections):
    """This rank's connections; one thread may use them. Collective: one all-gather of 64 bytes, and
    one all-reduce.

    Args:
        ranks: This rank among all.
        address: By which the others reach this host.
        seconds: How much later than this rank another may come to an agreement.

    Raises:
        OSError: On every rank, if one cannot reach those that it is to be linked with.
    """

    _send_buffer = 2 * _MOST_BYTES
    """A whole message has room on its way, so no circle of ranks waits to be rid of theirs."""

    def __init__(self, ranks: Ranks, address: str = "127.0.0.1", seconds: float = 7200.0) -> None:
        distances = [1 << number for number in range(rounds(ranks.size))]
        super().__init__(
            ranks,
            [(ranks.rank + distance) % ranks.size for distance in distances],
            [(ranks.rank - distance) % ranks.size for distance in distances],
            address,
            seconds,
        )

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


def _message(from_: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(filled(from_, bytearray(_LENGTH.size)))
    if length > _MOST_BYTES:
        raise OSError(f"a message of {length:,} bytes")
    return bytes(filled(from_, bytearray(length)))
