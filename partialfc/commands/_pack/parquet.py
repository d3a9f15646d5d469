"""Images in parquet files, as Hugging Face's datasets has them: a column of images, one of labels.

A place is ``FILE.parquet:row group:row``. Rows are read in the order of the files, a row group at a
time, because they lie on the disk so; the pack is sorted when it is written.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from partialfc.commands._command import tracked

try:
    import pyarrow as arrow
    import pyarrow.parquet as parquet
except ImportError:
    arrow = parquet = None

SUFFIX = ".parquet"
_LABELS = ("label", "identity", "cls", "class", "id")
_MOST_BYTES = 1 << 32


def rows_of(shards: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield label and place of every row; the label is "" where there is none.

    Raises:
        ModuleNotFoundError: If pyarrow is missing.
        ValueError: If a file does not say which column is which.
    """
    if parquet is None:
        raise ModuleNotFoundError("no pyarrow", name="pyarrow")
    for shard in shards:
        _, label = _columns(shard)
        file = parquet.ParquetFile(shard)
        for group in range(file.num_row_groups):
            values = file.read_row_group(group, columns=[label]).column(0)
            for row, value in enumerate(values.to_pylist()):
                yield "" if value is None else str(value).strip(), f"{shard.name}:{group}:{row}"


def labels_of(shards: list[Path]) -> set[str]:
    """Return all labels, of one pass over their columns."""
    return {label for label, _ in tracked(rows_of(shards), "rows listed") if label}


def read_row(root: Path, place: str) -> bytes:
    """Return the bytes of the image at a place."""
    name, group, row = place.rsplit(":", 2)
    value = _images(root / name, int(group))[int(row)].as_py()
    data: bytes | None = value["bytes"] if isinstance(value, dict) else value
    if not data:
        raise ValueError("the row has no bytes of an image")
    return data


@lru_cache(maxsize=1)
def _images(path: Path, group: int) -> Any:
    file = parquet.ParquetFile(path)
    size = file.metadata.row_group(group).total_byte_size
    if size > _MOST_BYTES:
        raise ValueError(f"row group {group} has {size} bytes, at most {_MOST_BYTES} are read")
    return file.read_row_group(group, columns=[_columns(path)[0]]).column(0)


def _columns(path: Path) -> tuple[str, str]:
    """Names of the columns of images and of labels."""
    kinds = arrow.types
    images, labels = [], []
    try:
        schema = parquet.read_schema(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    for column in schema:
        kind = column.type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        has_bytes = kinds.is_struct(kind) and "bytes" in {part.name for part in kind}
        if has_bytes or kinds.is_binary(kind) or kinds.is_large_binary(kind):
            images.append(column.name)
        elif kinds.is_integer(kind) or kinds.is_string(kind) or kinds.is_large_string(kind):
            labels.append(column.name)
    if len(labels) > 1 or not set(_LABELS).isdisjoint(schema.names):
        labels = [name for name in labels if name in _LABELS]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{path}: it must have one column of images (bytes, or a struct with bytes) and one of "
            f"identities (whole numbers or text; of several, one that is named "
            f"{', '.join(_LABELS)}), and has {', '.join(schema.names)}."
        )
    return images[0], labels[0]
