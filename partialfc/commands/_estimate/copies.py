"""Which number of copies of the class centers a cluster would be fastest with.

The arithmetic is that of ``partialfc/head/copies.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from partialfc.commands._estimate.backbone import GIB
from partialfc.commands._estimate.cluster import Cluster
from partialfc.commands._estimate.head import head_parts, heads_of
from partialfc.commands._estimate.step_time import moved_by, products_and_rows, sent_by
from partialfc.config import Config


@dataclass(frozen=True, slots=True)
class Layout:
    """How a head may lie on the ranks of a cluster.

    Attributes:
        ranks_per_copy: Ranks that hold the class centers together.
        copies: How often they are held.
        seconds: What the head takes of a step.
        bytes: Of centers and row states of a rank.
        sent: Bytes that a rank sends in a step for the collectives of the head.
        moving: What these take of ``seconds``.
    """

    ranks_per_copy: int
    copies: int
    seconds: float
    bytes: int
    sent: int
    moving: float

    @property
    def words(self) -> str:
        """As a part of a sentence."""
        return (
            f"over {self.ranks_per_copy:,} ranks {self.seconds * 1e3:,.1f} ms and "
            f"{self.bytes / GIB:,.1f} GiB of centers and states a rank"
        )


def layouts(config: Config, identities: Mapping[str, int], cluster: Cluster) -> list[Layout]:
    """Return what one copy, and copies over fewer ranks, would take: whole nodes and parts of one.

    Fewest copies first. None on one node, and none for several heads: each chooses for itself.
    """
    if cluster.nodes == 1 or len(identities) > 1 or getattr(config.head, "ranks", None):
        return []
    found = []
    batch = config.data.global_batch // config.optimizer.accumulation
    for ranks in range(cluster.ranks, 0, -1):
        whole = ranks % cluster.gpus_per_node == 0 or cluster.gpus_per_node % ranks == 0
        if cluster.ranks % ranks or not whole or batch % (cluster.ranks // ranks):
            continue
        several = {"ranks_per_copy": ranks, "fused": False, "overlap": False}
        one_copy = {"ranks_per_copy": None}
        head = config.head.model_copy(update=several if ranks < cluster.ranks else one_copy)
        one = config.model_copy(update={"head": head})
        (of_head,) = heads_of(one, identities, cluster.ranks, cluster.device)
        computed, moved = (
            sum(time for _, time, _ in part(of_head, cluster))
            for part in (products_and_rows, moved_by)
        )
        centers, states, *_ = head_parts(
            of_head.config, of_head.shard, cluster.ranks, cluster.device, cluster.gpu.card
        )
        size, sent = centers.bytes[0] + states.bytes[0], sent_by(of_head, cluster)
        found.append(Layout(ranks, of_head.copies, computed + moved, size, sent, moved))
    return found


def fastest(found: list[Layout]) -> Layout:
    """Return the fastest of those that have several copies."""
    return min(found[1:], key=lambda layout: layout.seconds)


def compared(found: list[Layout]) -> str:
    """Return in a sentence which is the fastest; "" where there is nothing to compare."""
    if len(found) < 2:
        return ""
    one, best = found[0], fastest(found)
    said = f"One copy of the class centers {one.words}"
    said += f"; {best.copies:,} copies (head.ranks_per_copy) {best.words}"
    if best.seconds < one.seconds:
        return f"{said}: {best.copies:,} are the fastest.\n"
    return f"{said}, the fastest of several: one copy is faster.\n"
