"""Show what a pack holds: counts, how its labels and sizes are distributed, and some faces.

With --out it also draws labels.png (images of each identity, images per identity, JPEG sizes) and
faces.png (a row of images for some identities, spread evenly over the pack). The header of every
image is read; a pack of many millions takes a while.
"""

# Shape suffixes: N = images, C = identities.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from partialfc.commands._command import command_parser, tracked

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from partialfc.data.images.formats import decode_image
from partialfc.data.packs.pack import Pack, open_pack

CHUNK = 1 << 18
ROWS, COLUMNS = 8, 10
INK, MUTED, BLUE, ORANGE = "#1f2933", "#7b8794", "#3d6fb6", "#d9822b"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Contents:
    """The identity and the JPEG bytes of every image [N], and how many images each identity has.

    Shape suffixes: N = images, C = identities.
    """

    identity_N: NDArray[np.int64]
    bytes_N: NDArray[np.int64]
    images_C: NDArray[np.int64]


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("show", __doc__)
    parser.add_argument("pack", type=Path, help="a .rec file with its .idx beside it")
    parser.add_argument("--out", type=Path, help="folder for labels.png and faces.png")
    options = parser.parse_args(arguments)
    pack = open_pack(options.pack)
    contents = read(pack)
    print_counts(pack, contents)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            draw_labels(pack, contents).savefig(options.out / "labels.png")
            draw_faces(pack, contents).savefig(options.out / "faces.png")
    return 0


def read(pack: Pack) -> Contents:
    """Read the header of every image."""
    identities, sizes = [], []
    starts = range(0, len(pack), CHUNK)
    for start in tracked(starts, "headers read"):
        chunk = np.arange(start, min(start + CHUNK, len(pack)))
        identities.append(pack.identities(chunk))
        sizes.append(pack.jpeg_bytes(chunk))
    identity_N = np.concatenate(identities)
    images_C = np.bincount(identity_N, minlength=pack.num_identities)
    return Contents(identity_N, np.concatenate(sizes), images_C)


def print_counts(pack: Pack, contents: Contents) -> None:
    """Print the table of counts."""
    rows = {
        "images": f"{len(pack):,}",
        "identities": f"{len(contents.images_C):,}",
        "identities without images": f"{int((contents.images_C == 0).sum()):,}",
        "file": f"{pack.path.stat().st_size:,} bytes",
        "images per identity": _spread(contents.images_C),
        "bytes per image": _spread(contents.bytes_N),
        "fingerprint": pack.fingerprint,
    }
    table = Table("", str(pack.path), box=None, header_style="bold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(markup=False).print(table)


def draw_labels(pack: Pack, contents: Contents) -> Figure:
    """Draw the images of each identity, and two histograms."""
    figure = plt.figure(figsize=(10, 6), layout="constrained")
    wide, left, right = figure.subplot_mosaic([["labels", "labels"], ["images", "bytes"]]).values()
    num_identities = len(contents.images_C)
    figure.suptitle(
        f"{pack.path.name}: {len(pack):,} images of {num_identities:,} identities",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )

    bins = min(num_identities, 200)
    edges = np.linspace(0, num_identities, bins + 1).astype(np.int64)
    mean = np.add.reduceat(contents.images_C, edges[:-1]) / np.diff(edges)
    wide.stairs(mean, edges, fill=True, color=BLUE)
    wide.set(
        title="Images of each identity" + ("" if bins == num_identities else " (mean of each bin)"),
        xlabel="identity",
        ylabel="images",
        xlim=(0, num_identities),
    )
    wide.xaxis.set_major_locator(MaxNLocator(integer=True))

    largest = int(contents.images_C.max())
    step = -(-(largest + 1) // 50)
    _histogram(
        left,
        contents.images_C,
        (np.arange(0, largest + step + 1, step) - 0.5).tolist(),
        "identities",
    )
    left.set(title="Images per identity", xlabel="images")
    _histogram(right, contents.bytes_N / 1024, 50, "images")
    right.set(title="Size of the JPEG images", xlabel="KiB")
    return figure


def draw_faces(pack: Pack, contents: Contents) -> Figure:
    """Draw a row of images for some identities that have several, if enough do."""
    several = np.flatnonzero(contents.images_C >= min(COLUMNS, 2))
    some = several if len(several) else np.flatnonzero(contents.images_C)
    rows = some[np.linspace(0, len(some) - 1, min(ROWS, len(some))).astype(np.int64)]
    order_N = np.argsort(contents.identity_N, kind="stable")
    columns = int(min(COLUMNS, contents.images_C[rows].max()))
    figure, axes = plt.subplots(
        len(rows),
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(0.6 + 0.9 * columns, 0.5 + 0.9 * len(rows)),
    )
    figure.suptitle(f"{pack.path.name}: identities and their images", x=0.01, ha="left")
    for row, identity in enumerate(rows):
        start = int(contents.images_C[:identity].sum())
        images = order_N[start : start + contents.images_C[identity]][:columns]
        for column in range(columns):
            axes[row, column].set_axis_off()
            if column < len(images):
                _show(axes[row, column], pack.jpeg(int(images[column])))
        axes[row, 0].text(
            -0.08, 0.5, str(identity), transform=axes[row, 0].transAxes, ha="right", va="center"
        )
    return figure


def _histogram(axes: Axes, values: NDArray[np.number], bins: int | list[float], unit: str) -> None:
    median = float(np.median(values))
    axes.hist(values, bins=bins, color=BLUE)
    axes.axvline(median, color=ORANGE, linewidth=1.5)
    axes.set_ylabel(unit)


def _show(axes: Axes, jpeg: bytes) -> None:
    try:
        axes.imshow(decode_image(np.frombuffer(jpeg, np.uint8)))
    except ValueError:
        axes.text(
            0.5, 0.5, "broken", ha="center", va="center", color=ORANGE, transform=axes.transAxes
        )


def _spread(values: NDArray[np.int64]) -> str:
    low, middle, high = values.min(), np.median(values), values.max()
    return f"{low:,} min, {middle:,.0f} median, {high:,} max"
