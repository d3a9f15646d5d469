"""Embeddings in files: .npy with names beside it, or .parquet with everything in one.

``faces.npy`` is fp32 [N, D]; ``faces.csv`` beside it has a line "name,identity" for each row. Of a
pack, ``faces.origin.json`` says which one it was, so that the rows can teach a run on it.
"""

# Shape suffixes: N = images, D = embedding.

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.vectors import Origin, write_origin
from partialfc.writing import atomic_write

_COLUMNS = ("name", "identity", "embedding")


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """Embeddings of images, not normalised.

    Attributes:
        names: Of the images, [N].
        identities: Of the images, or "" where they are not known; [N].
        rows_ND: fp32 [N, D].
        origin: The pack that they are of, if it is one.
    """

    names: list[str]
    identities: list[str]
    rows_ND: NDArray[np.float32]
    origin: Origin | None = None


def write_embeddings(path: Path, found: Embeddings) -> None:
    """Write ``.npy`` and what is beside it, or ``.parquet``; each file whole or not at all.

    Raises:
        ValueError: If the name has another ending.
    """
    if path.suffix == ".npy":
        names = path.with_suffix(".csv")
        with (
            atomic_write(names) as partial,
            partial.open("w", newline="", encoding="utf-8") as text,
        ):
            writer = csv.writer(text)
            writer.writerow(_COLUMNS[:2])
            writer.writerows(zip(found.names, found.identities, strict=True))
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, found.rows_ND)
        write_origin(path, found.origin)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        flat = pa.array(np.ascontiguousarray(found.rows_ND).ravel(), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, found.rows_ND.shape[1])
        columns = [pa.array(found.names), pa.array(found.identities), column]
        with atomic_write(path) as partial:
            parquet.write_table(pa.Table.from_arrays(columns, names=list(_COLUMNS)), partial)
    else:
        raise ValueError(f"{path}: must end in .npy or .parquet.")


def read_embeddings(path: Path) -> Embeddings:
    """Read what :func:`write_embeddings` wrote.

    Raises:
        ValueError: If it is something else; the message names the file.
        OSError: If a file is missing.
    """
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with path.open("rb") as file:  # its own error of a missing file has no reason
                table = parquet.read_table(file, columns=list(_COLUMNS)).combine_chunks()
            column = table["embedding"].combine_chunks()
            width = column.type.list_size
            rows_ND = np.asarray(column.flatten().to_numpy(), np.float32).reshape(-1, width)
            names, identities = (table[name].to_pylist() for name in _COLUMNS[:2])
        except (pa.ArrowException, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: {error}: must have the columns name, identity and embedding (a list of "
                "fixed length)."
            ) from error
    elif path.suffix == ".npy":
        rows_ND = np.load(path, allow_pickle=False)
        with path.with_suffix(".csv").open(newline="", encoding="utf-8") as text:
            lines = list(csv.reader(text))[1:]
        names, identities = [line[0] for line in lines], [line[1] for line in lines]
    else:
        raise ValueError(f"{path}: must end in .npy or .parquet, as partialfc embed writes them.")
    if rows_ND.ndim != 2 or rows_ND.dtype != np.float32 or len(names) != len(rows_ND):
        raise ValueError(
            f"{path}: {len(names)} names for {rows_ND.dtype} {list(rows_ND.shape)}; must be fp32 "
            "[N, D] with N names."
        )
    return Embeddings(names, identities, rows_ND)
