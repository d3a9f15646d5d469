"""What class centers that start from something take, once, before the first step."""

from partialfc.checkpoint.center_file import PIECE_BYTES, open_centers
from partialfc.commands._estimate.backbone import Device, MemoryItem
from partialfc.config import Config, ConfigError
from partialfc.definitions.phrases import to_value
from partialfc.errors import in_words

_COPIES = 3
"""Of a piece in fp64: its rows, the turned ones, and these in their format."""


def refuse_other_centers(config: Config, identities: int, key: str = "head") -> None:
    """Refuse a file that does not fit, where it is on this machine; ``key`` is the head's section.

    Raises:
        ConfigError: If it has another shape or dtype, or is damaged.
    """
    path = config.head.start_file
    if path is None or not path.exists():
        return
    try:
        open_centers(path, identities, config.backbone.embedding_dim)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}.start = {to_value(path)}: {in_words(error)}") from error


def start_parts(config: Config, identities: int, device: Device) -> list[MemoryItem]:
    """Return the host memory, which is a process's own on a CPU alone.

    Args:
        config: Of the run.
        identities: Of the largest rank.
        device: Of the run.
    """
    settings = config.head
    if settings.start == "random" or device != "cpu":
        return []
    row = 4 * config.backbone.embedding_dim
    if settings.start_file is None:
        size = 0 if settings.host_folder else identities * row
        why = f"{identities:,} fp32 sums; takes a forward pass of all images besides"
    else:
        size = min(_COPIES * PIECE_BYTES, _COPIES * 2 * row * identities)
        why = "a piece of the file in fp64, turned and rounded"
    return [MemoryItem("start of the centers", (0, 0, 0, size), f"{why}; before the first step")]
