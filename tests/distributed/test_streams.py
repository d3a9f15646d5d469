"""Bytes between ranks, with real sockets: both ways at once, and who is gone is told of."""

import threading

import pytest
import torch
import torch.distributed as dist

from partialfc.distributed import streams as of_streams
from partialfc.distributed.streams import Streams
from tests.support.together import Together
from tests.support.waiting import PATIENCE

MANY = 3 << 20
"""More than a socket holds, so a rank that only sends would stand still."""


def pieces_of(whole, size):
    return iter(whole.split(size))


def bytes_of(rank, other):
    return torch.arange(MANY, dtype=torch.int64).mul(rank * 31 + other + 1).to(torch.uint8)


@pytest.mark.parametrize("size", [2, 5])
def test_every_rank_sends_to_and_receives_from_every_other_at_once(size):
    """Pieces of the two ends need not be equal: what counts is bytes, in their order."""

    def exchange(ranks):
        me, told = ranks.rank, []
        others = [rank for rank in range(size) if rank != me]
        with Streams(ranks, others, others, seconds=30.0) as streams:
            for _ in range(2):  # over the same connections
                into = {rank: torch.zeros(MANY, dtype=torch.uint8) for rank in others}
                sent = streams.exchange(
                    {rank: pieces_of(bytes_of(me, rank), 1 << 20) for rank in others},
                    {rank: pieces_of(whole, 700_001) for rank, whole in into.items()},
                    tell=lambda: told.append(1),
                )
                assert sent == MANY * len(others)
                for rank, whole in into.items():
                    assert torch.equal(whole, bytes_of(rank, me))
        return len(told)

    each = 2 * (size - 1) * (3 + 5)
    assert Together(size).run(exchange) == [each] * size


def test_a_rank_is_connected_with_those_alone_that_it_names():
    """A gloo group is a connection with each of 4,096."""

    def ring(ranks):
        to, from_ = (ranks.rank + 1) % 6, (ranks.rank - 1) % 6
        with Streams(ranks, [to], [from_], seconds=30.0) as streams:
            into = torch.zeros(5, dtype=torch.uint8)
            own = torch.full((5,), ranks.rank, dtype=torch.uint8)
            streams.exchange({to: iter([own])}, {from_: iter([into])})
            return len(streams._to), len(streams._from), into.tolist()

    found = Together(6).run(ring)
    assert found == [(1, 1, [(rank - 1) % 6] * 5) for rank in range(6)]


def test_a_rank_without_streams_takes_part_in_making_them():
    def exchange(ranks):
        to, from_ = ([1], []) if ranks.rank == 0 else ([], [0] if ranks.rank == 1 else [])
        into = torch.zeros(3, dtype=torch.uint8)
        with Streams(ranks, to, from_, seconds=30.0) as streams:
            own = {rank: iter([torch.tensor([7, 8, 9], dtype=torch.uint8)]) for rank in to}
            streams.exchange(own, {rank: iter([into]) for rank in from_})
        return into.tolist()

    assert Together(3).run(exchange) == [[0, 0, 0], [7, 8, 9], [0, 0, 0]]


def test_where_one_rank_is_gone_the_other_streams_do_not_wait():
    """Rank 2 leaves in the middle; rank 0 also waits for rank 1, which waits for nobody."""
    gone = threading.Event()

    def exchange(ranks):
        others = [rank for rank in range(3) if rank != ranks.rank]
        with Streams(ranks, others, others, seconds=2 * PATIENCE) as streams:
            if ranks.rank == 2:
                return ""
            if ranks.rank == 1:
                assert gone.wait(PATIENCE), "rank 0 waited for this one"
                return ""
            into = {rank: torch.zeros(MANY, dtype=torch.uint8) for rank in others}
            try:
                streams.exchange({}, {rank: iter([whole]) for rank, whole in into.items()})
            except dist.DistNetworkError as error:
                return str(error)
            finally:
                gone.set()

    assert "rank 2 or its host is gone" in Together(3).run(exchange)[0]


def test_what_is_wrong_with_a_piece_is_said_as_it_is():
    """A length that another rank tells is compared before there is memory for it."""

    def wrong():
        yield torch.zeros(8, dtype=torch.uint8)
        raise ValueError("8 bytes came from another rank, not 9")

    def exchange(ranks):
        to, from_ = ([1], []) if ranks.rank == 0 else ([], [0])
        with Streams(ranks, to, from_, seconds=30.0) as streams:
            if ranks.rank == 0:
                streams.exchange({1: iter([torch.ones(8, dtype=torch.uint8)])}, {})
                return
            with pytest.raises(ValueError, match="8 bytes came"):
                streams.exchange({}, {0: wrong()})

    Together(2).run(exchange)


def test_no_thread_is_made_for_nothing(monkeypatch):
    monkeypatch.setattr(of_streams, "ThreadPoolExecutor", None)

    def exchange(ranks):
        with Streams(ranks, [], [], seconds=30.0) as streams:
            return streams.exchange({}, {})

    assert Together(2).run(exchange) == [0, 0]
