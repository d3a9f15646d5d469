"""Ranks as threads of one process, with real sockets between them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

from partialfc.distributed import connections
from partialfc.distributed.ranks import Ranks
from tests.support.waiting import PATIENCE


class Together:
    """Some ranks that make :class:`~.connections.Connections`; what is gathered goes by memory.

    Args:
        size: How many.
    """

    def __init__(self, size):
        self.size, self.rows, self.barrier = size, {}, threading.Barrier(size, timeout=PATIENCE)

    def gather(self, own, ranks):
        """What every rank has; a collective."""
        self.rows[ranks.rank] = own
        self.barrier.wait()
        found = [self.rows[rank] for rank in range(self.size)]
        self.barrier.wait()
        return found

    def run(self, function):
        """What ``function(ranks)`` returns on each rank, all of them at once."""
        with (
            patch.object(connections, "_of_all", self.gather),
            patch.object(connections, "words_of_any", lambda *own: max(self.gather(*own))),
            ThreadPoolExecutor(self.size) as pool,
        ):
            return [*pool.map(function, [Ranks(rank, self.size) for rank in range(self.size)])]
