"""Bytes between ranks: several streams at once, each a piece at a time, from and into memory.

A rank is connected with those that it sends to and receives from, and with no other.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NoReturn

import torch.distributed as dist
from torch import Tensor

from partialfc.distributed.connections import Connections, filled
from partialfc.distributed.ranks import Ranks

Pieces = Iterator[Tensor]
"""Bytes [n] in memory of the host, none of them empty, which are sent or filled before the next."""


class Streams(Connections):
    """Connections to some ranks and from some. Collective: as :class:`Connections`.

    Args:
        ranks: This rank among all.
        to: Ranks that this one sends to; each has it in its ``from_``.
        from_: Ranks that it receives from.
        address: By which the others reach this host.
        seconds: How long this rank waits for a piece.

    Raises:
        OSError: On every rank, if one cannot reach another.
    """

    def __init__(
        self,
        ranks: Ranks,
        to: Collection[int],
        from_: Collection[int],
        address: str = "127.0.0.1",
        seconds: float = 7200.0,
    ) -> None:
        super().__init__(ranks, sorted(to), sorted(from_), address, seconds)

    def exchange(
        self,
        sends: Mapping[int, Pieces],
        receives: Mapping[int, Pieces],
        *,
        tell: Callable[[], None] = lambda: None,
    ) -> int:
        """Send pieces to ranks and fill those that come from ranks; return how many bytes went out.

        Each stream has a thread, so none waits for another. Both ends of one have as many bytes.

        Args:
            sends: By the rank that they go to.
            receives: By the rank that they come from.
            tell: Called after each piece, by any of the threads.

        Raises:
            dist.DistNetworkError: If a rank is gone, or does not come.
        """
        if not sends and not receives:
            return 0

        def send(rank: int, pieces: Pieces) -> int:
            one, sent = self._to[self._called.index(rank)], 0
            for piece in pieces:
                try:
                    one.sendall(piece.numpy().data)
                except OSError as error:
                    _gone(rank, error)
                sent += len(piece)
                tell()
            return sent

        def receive(rank: int, pieces: Pieces) -> int:
            one = self._from[self._expected.index(rank)]
            for piece in pieces:
                try:
                    filled(one, piece.numpy().data)
                except OSError as error:
                    _gone(rank, error)
                tell()
            return 0

        with ThreadPoolExecutor(len(sends) + len(receives), "streams") as pool:
            under_way = [pool.submit(send, *one) for one in sends.items()]
            under_way += [pool.submit(receive, *one) for one in receives.items()]
            try:
                return sum(one.result() for one in as_completed(under_way))
            except BaseException:
                self.close()  # so that no other stream waits for what does not come
                raise


def _gone(rank: int, error: OSError) -> NoReturn:
    raise dist.DistNetworkError(f"rank {rank} or its host is gone: {error}") from error
