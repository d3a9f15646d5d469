"""What is wrong with a checkpoint's files, looked at by all ranks together: each a share of them.

The files are laid out in a line, which is cut among the ranks; so a rank opens one or two of them
more than it would alone, and a large file is read by several.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from partialfc.checkpoint.folder import MANIFEST, is_named, note_of, read_manifest, step_of
from partialfc.checkpoint.parts import parts_of
from partialfc.checkpoint.pieces import THREADS, compare_pieces
from partialfc.errors import CheckpointError, OtherFormatError

_OF_HOSTS = (
    " (written with checkpoint.shared = false: what each host has of it belongs together in one "
    "folder)"
)


def verify(path: Path, *, part: int = 0, of: int = 1, content: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, or ``None`` if every file is as it was written.

    It takes no longer than reading so many bytes as the manifest says.

    Args:
        path: Of the checkpoint.
        part: Which share of the files to read, in [0, of): ranks divide them.
        of: Shares.
        content: Whether to compare checksums. Otherwise a file must be there and have its size, and
            who reads it compares them.

    Raises:
        OtherFormatError: If it is of another format; what it is like is not known then.
    """
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(path)
        if is_named(path) and manifest["step"] != step_of(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        with ThreadPoolExecutor(THREADS) as pool:
            for file, start, stop in _share([*manifest["files"], *parts_of(manifest)], part, of):
                note = note_of(path, manifest, file)
                count = len(note.sha256) if content else 0
                pieces = range(count * start // of, count * stop // of)
                compare_pieces(path / file, note, pieces, pool)
        return None
    except OtherFormatError:
        raise
    except CheckpointError as error:
        return f"{error}{_OF_HOSTS if 'hosts' in manifest else ''}"


def _share(files: Sequence[str], part: int, of: int) -> Iterator[tuple[str, int, int]]:
    """Yield the files of a share; from which part of each on, and to which, in parts of 1/of."""
    low, high = len(files) * part, len(files) * (part + 1)
    for number in range(low // of, -(-high // of)):
        yield files[number], max(0, low - number * of), min(of, high - number * of)
