"""Links of ranks, with real sockets: all learn what one knows, and strangers are let down."""

import socket
import threading

import pytest
import torch.distributed as dist

from partialfc.distributed.links import Links, any_rank, rounds
from partialfc.distributed.ranks import Ranks
from tests.support.ranks import run_on_ranks
from tests.support.together import Together
from tests.support.waiting import PATIENCE


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_all_learn_what_any_one_knows(size):
    """Of any number of ranks, whichever it is that knows; again and again over the same links."""

    def learn(ranks):
        with Links(ranks, "127.0.0.1", 30.0) as links:
            flags = [links.any(ranks.rank == one) for one in range(size)]
            nothing = links.any(False)
            knows = {size - 1: "later", 1: "größer"}
            words = links.words_of_any(knows.get(ranks.rank, ""))
            long = links.words_of_any("x" * 100_000)
            every = links.union({bytes([ranks.rank, 7])}, 2)
            return flags, nothing, words, links.words_of_any(""), len(long), every

    every = {bytes([rank, 7]) for rank in range(size)}
    expected = ([True] * size, False, "größer", "", (1 << 16) - 4, every)
    assert Together(size).run(learn) == [expected] * size


def test_messages_grow_with_the_logarithm():
    """A ring of an integer among 4,096 ranks was 8,190 messages, one after the other."""
    assert [rounds(size) for size in (2, 3, 4, 5, 1024, 4096, 4097)] == [1, 2, 2, 3, 10, 12, 13]


def test_who_waits_for_a_rank_that_is_gone_is_told():
    def leave(ranks):
        links = Links(ranks, "127.0.0.1", 30.0)
        if ranks.rank == 2:
            links.close()
            return ""
        with links:
            try:
                links.any(False)
            except dist.DistNetworkError as error:
                return str(error)

    told = Together(3).run(leave)
    assert "rank 2 or one that it waits for is gone" in "; ".join(told)
    assert all(told[:2])


def test_a_rank_that_does_not_come_is_not_waited_for_forever():
    told = threading.Event()

    def wait(ranks):
        with Links(ranks, "127.0.0.1", 0.3) as links:
            if ranks.rank == 1:
                assert told.wait(PATIENCE)
                return
            with pytest.raises(dist.DistNetworkError, match="timed out"):
                links.any(True)
            told.set()

    Together(2).run(wait)


def test_who_is_no_rank_is_not_listened_to():
    """Anybody may call a port: a rank knows the token that this one told to ranks alone."""
    together = Together(2)
    gather = together.gather

    def stranger_first(own, ranks):
        every = gather(own, ranks)
        if hasattr(own, "port") and ranks.rank == 0:
            for words in (b"\0" * 16 + b"\1\0\0\0", b"x", b"\1" * 10_000):
                with socket.create_connection((own.host, own.port)) as stranger:
                    stranger.sendall(words)
        return every

    together.gather = stranger_first

    def learn(ranks):
        with Links(ranks, "127.0.0.1", 30.0) as links:
            return links.any(ranks.rank == 1)

    assert together.run(learn) == [True, True]


def test_an_address_that_is_not_this_hosts_is_refused_on_every_rank():
    def meet(ranks):
        with pytest.raises(OSError, match=r"rank 1 cannot listen on 192\.0\.2\.7.*GLOO_SOCKET_IF"):
            Links(ranks, "192.0.2.7" if ranks.rank else "127.0.0.1", 30.0)

    Together(2).run(meet)


def test_a_message_longer_than_any_is_refused():
    def say(ranks):
        with Links(ranks, "127.0.0.1", 30.0) as links:
            if ranks.rank == 1:
                links._to[0].sendall(b"\xff\xff\xff\xff")
                return
            with pytest.raises(dist.DistNetworkError, match="4,294,967,295 bytes"):
                links.any(False)

    Together(2).run(say)


def fails_on_rank(rank, world_size):
    """What a rank hears where another one fails between two steps."""
    heard = "nothing"
    try:
        with Links(Ranks.of()) as links, any_rank(lambda: False, links) as agreed:
            for step in range(3):
                if rank == 1 and step == 1:
                    raise ValueError("failed")
                agreed()
    except (ValueError, dist.DistNetworkError) as error:
        heard = type(error).__name__
    return heard


@pytest.mark.distributed
def test_a_rank_that_fails_between_two_steps_is_missed_at_the_next():
    network = "DistNetworkError"
    assert run_on_ranks(3, fails_on_rank) == [network, "ValueError", network]
