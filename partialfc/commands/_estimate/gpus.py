"""Rates of GPUs, and the shares of them that are reached; needs no settings."""

from dataclasses import dataclass

from partialfc.head.tiles.cards import Card, card_for

_GIB = 2**30

PRODUCTS, BACKBONE, HEAD_SHARE, MEMORY = 0.78, 0.25, 0.55, 0.90
"""Reached of the peak: matrix products, the backbone; of that product rate: the head; memory."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak rates of a GPU, or of one rank's share of this machine's CPU.

    Attributes:
        memory: Bytes.
        bf16, fp16, tf32, fp32: Dense matrix products, FLOP/s.
        bandwidth: Of its memory, bytes/s.
        link: To the other GPUs of its node, bytes/s in each direction.
        capability: Compute capability of a GPU; (0, 0) of a CPU.
    """

    name: str
    memory: int
    bf16: float
    fp16: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    capability: tuple[int, int] = (0, 0)

    @property
    def card(self) -> Card | None:
        """Whose tiles the fused kernels have there; ``None`` where they cannot run."""
        return card_for(self.capability, self.name.upper())


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 140 * _GIB, 989e12, 989e12, 495e12, 67e12, 4.8e12, 450e9, (9, 0)),
        Gpu("h100", 79 * _GIB, 989e12, 989e12, 495e12, 67e12, 3.35e12, 450e9, (9, 0)),
        Gpu("a100", 79 * _GIB, 312e12, 312e12, 156e12, 19.5e12, 2.0e12, 300e9, (8, 0)),
        Gpu("v100-32g", 31 * _GIB, 15.7e12, 125e12, 15.7e12, 15.7e12, 0.9e12, 150e9, (7, 0)),
    )
}
"""SXM modules. Memory as the driver reports it; rates are the data sheets' dense peaks. A V100 has
no bf16 and no TF32: its fp32 rate stands for both."""
