"""What the lists of neighbours of ``head.negatives = "nearest"`` take: memory, and a search."""

from partialfc.commands._estimate.backbone import Device, MemoryItem
from partialfc.config import Config
from partialfc.head.neighbours import Cut

LIST_BYTES, ENTRY_BYTES, KEY_BYTES = 4, 10, 8
"""Of a neighbour: in the lists, as whose neighbour it is, and while it is searched."""
SCORE_PASSES = 4
"""How often a score is read or written: made, divided by the length, and looked at by groups."""


def searches(config: Config) -> bool:
    """Return whether a head has such lists."""
    return config.head.negatives == "nearest" and config.head.sample_rate < 1


def nearest_parts(
    config: Config, rows: int, dim: int, device: Device, ranks: int
) -> list[MemoryItem]:
    """Return the lists, which are in host memory: a process's own on a CPU alone; and a search.

    Args:
        config: Of the run.
        rows: Of the largest rank.
        dim: Elements of a row.
        device: Of the run.
        ranks: Those that hold the class centers together.
    """
    if not searches(config):
        return []
    most, cut = config.head.nearest.neighbours, Cut.of(device, ranks)
    looking = min(cut.looking, rows)
    kept = rows * most * (LIST_BYTES + ENTRY_BYTES)
    scores = 4 + 4 * (device == "cpu") + 1  # products of int8 are int32 first
    tiles = cut.block * looking * scores
    tiles += (cut.block + looking) * dim * (4 + 4 + 1) + cut.at_once * cut.block * dim * 2
    search = rows * most * KEY_BYTES + tiles
    where = "in host memory" if device == "cuda" else "in memory"
    return [
        MemoryItem.always(
            "lists of neighbours",
            kept if device == "cpu" else 0,
            f"{rows:,} x {most} x {LIST_BYTES + ENTRY_BYTES} B, {kept / 2**30:,.2f} GiB {where}",
        ),
        MemoryItem(
            "search of neighbours",
            (search, 0, 0, 0),
            f"{rows:,} x {most} x {KEY_BYTES} B, a tile of {looking:,} x {cut.block:,} scores; "
            f"every {config.head.nearest.every_steps:,} steps",
        ),
    ]


def search_seconds(
    config: Config, rows: int, every: int, dim: int, *, products: float, bandwidth: float
) -> tuple[float, str]:
    """Return what a search takes, and its arithmetic.

    Args:
        config: Of the run.
        rows: Of the largest rank.
        every: Of all ranks.
        dim: Elements of a row.
        products: FLOP/s that products reach.
        bandwidth: Bytes/s that memory reaches.
    """
    pairs = rows * every
    seconds = pairs * (2 * dim / products + 4 * SCORE_PASSES / bandwidth)
    return seconds, (
        f"{seconds:,.3g} s every {config.head.nearest.every_steps:,} steps: {rows:,} x {every:,} "
        f"scores of {2 * dim} FLOP and {4 * SCORE_PASSES} B"
    )
