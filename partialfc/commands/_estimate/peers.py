"""What copies for other hosts take of a host's memory and of its network."""

from collections.abc import Mapping
from dataclasses import dataclass

from partialfc.commands._estimate.backbone import GIB, MemoryItem
from partialfc.config import Config
from partialfc.training.preflight import checkpoint_bytes

_GENERATIONS = 2


@dataclass(frozen=True, slots=True)
class PeersCost:
    """Of one host.

    Attributes:
        memory: Bytes of all its copies, of two generations.
        sent: Bytes that go out of it for one copy.
    """

    memory: int
    sent: int

    def words(self, every: int) -> str:
        """What it comes to, as a sentence."""
        return (
            f"checkpoint.peers_every_steps = {every}: copies take {self.memory / GIB:.2f} GiB of "
            f"the memory of each node, and {self.sent / GIB:.2f} GiB leave it for each."
        )

    def part(self, ranks: int) -> MemoryItem:
        """Return the share of each of a host's ranks."""
        why = "of this host and of another, two of each"
        return MemoryItem.always("copies", self.memory // ranks, why)


def peers_cost(config: Config, identities: Mapping[str, int], nodes: int) -> PeersCost | None:
    """Return what the copies of a run take; ``None`` where it makes none.

    Args:
        config: Of the run.
        identities: Of each head.
        nodes: Hosts.
    """
    if not config.checkpoint.peers_every_steps:
        return None
    backbone = checkpoint_bytes(config, dict.fromkeys(identities, 0), 1)
    rows = checkpoint_bytes(config, identities, 1) - backbone
    own = rows // nodes
    return PeersCost(_GENERATIONS * (backbone + own * min(nodes, 2)), own * (nodes > 1))
