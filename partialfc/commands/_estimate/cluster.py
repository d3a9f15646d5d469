"""What a run is to be trained on, and how fast its rings are."""

from dataclasses import dataclass

from partialfc.commands._estimate.backbone import Device
from partialfc.commands._estimate.gpus import Gpu

LINKS = 0.80
"""Reached of a link's rate."""
LATENCY, NETWORK_LATENCY = 3e-6, 10e-6
"""Seconds of a hop in a node, and between nodes."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the run is to be trained on; ``network`` is in bytes/s out of a node."""

    gpu: Gpu
    device: Device
    nodes: int
    gpus_per_node: int
    network: float

    @property
    def ranks(self) -> int:
        """World size."""
        return self.nodes * self.gpus_per_node

    def ring(self, ranks: int) -> tuple[float, float]:
        """Bytes/s of a ring over ranks that follow one another, and seconds of a hop in the mean.

        A node's share of it crosses the network once.
        """
        link = self.gpu.link * LINKS
        if self.nodes == 1 or (ranks <= self.gpus_per_node and self.gpus_per_node % ranks == 0):
            return link, LATENCY
        return min(link, self.network * LINKS), self._hop(min(ranks, self.gpus_per_node))

    def ring_across(self, ranks_per_copy: int) -> tuple[float, float]:
        """The same of the rings over the ranks of one place in each copy of the class centers.

        As many lie on a node as a copy has places there, and all send at once.
        """
        link = self.gpu.link * LINKS
        if self.nodes == 1:
            return link, LATENCY
        places = min(ranks_per_copy, self.gpus_per_node)
        rate = min(link, self.network / places * LINKS)
        return rate, self._hop(max(1, self.gpus_per_node // places))

    @staticmethod
    def _hop(of_node: int) -> float:
        """Seconds of a hop, where a ring goes through so many ranks of each node."""
        return (NETWORK_LATENCY + (of_node - 1) * LATENCY) / of_node
