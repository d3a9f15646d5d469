"""Show what a pack holds: counts, who has most images, how labels and sizes are distributed.

With --out it also draws labels.png (images of each identity, images per identity, JPEG sizes) and
faces.png (a row of images for some identities, spread evenly over the pack, each with its name and
number). Names are those that partialfc pack keeps beside the pack. The header of every image is
read; a pack of many millions takes a while.
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
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from partialfc.data.images.formats import decode_image
from partialfc.data.names import Names, names_path, own_names
from partialfc.data.packs.pack import Pack, open_pack

CHUNK = 1 << 18
ROWS, COLUMNS = 8, 8
LONG_TAIL = 10
"""So many times the median of images an identity are drawn on a logarithmic axis."""
SHOWN = 3
INK, MUTED, BLUE, ORANGE = "#1f2933", "#7b8794", "#3d6fb6", "#d9822b"
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
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
    """The identity and the JPEG bytes of every image [N], the images and the name of each identity.

    Shape suffixes: N = images, C = identities.
    """

    identity_N: NDArray[np.int64]
    bytes_N: NDArray[np.int64]
    images_C: NDArray[np.int64]
    names: Names | None = None

    def called(self, identity: int) -> str:
        """Name and number of an identity, or its number alone."""
        name = self.names[identity] if self.names is not None else None
        return f"{identity}" if name is None else f"{name} ({identity})"


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
    return Contents(identity_N, np.concatenate(sizes), images_C, own_names(pack))


def print_counts(pack: Pack, contents: Contents) -> None:
    """Print the table of counts."""
    rows = {
        "images": f"{len(pack):,}",
        "identities": f"{len(contents.images_C):,}",
        "identities without images": f"{int((contents.images_C == 0).sum()):,}",
        "file": f"{pack.path.stat().st_size:,} bytes",
        "images per identity": _spread(contents.images_C),
        "most images": ", ".join(
            f"{contents.called(identity)} {contents.images_C[identity]:,}"
            for identity in np.argsort(-contents.images_C, kind="stable")[:SHOWN].tolist()
        ),
        "names": "none" if contents.names is None else f"in {names_path(pack.path).name}",
        "bytes per image": _spread(contents.bytes_N),
        "fingerprint": pack.fingerprint,
    }
    table = Table("", str(pack.path), box=None, header_style="bold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(markup=False).print(table)


def draw_labels(pack: Pack, contents: Contents) -> Figure:
    """Draw the images of each identity, and two histograms, one below the other for a phone."""
    figure, (each, per, size) = plt.subplots(3, 1, figsize=(6.4, 8.4), layout="constrained")
    num_identities = len(contents.images_C)
    figure.suptitle(
        f"{pack.path.name}: {len(pack):,} images of {num_identities:,} identities",
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    largest, median = int(contents.images_C.max()), float(np.median(contents.images_C))
    is_long = largest > LONG_TAIL * max(1.0, median)
    said = " (log scale)" if is_long else ""

    bins = min(num_identities, 200)
    edges = np.linspace(0, num_identities, bins + 1).astype(np.int64)
    mean = np.add.reduceat(contents.images_C, edges[:-1]) / np.diff(edges)
    each.stairs(mean, edges, fill=True, color=BLUE)
    each.set(
        title="Images of each identity" + ("" if bins == num_identities else ", mean of each bin"),
        xlabel="identity",
        ylabel=f"images{said}",
        xlim=(0, num_identities),
    )
    each.xaxis.set_major_locator(MaxNLocator(integer=True))
    _histogram(per, contents.images_C, _bins(largest, is_long), "identities")
    per.set(title="Images per identity", xlabel=f"images{said}", ylabel=f"identities{said}")
    if is_long:
        each.set_yscale("log")
        per.set(xscale="log", yscale="log")
        _plain(each.yaxis, per.xaxis, per.yaxis)
        if without := int((contents.images_C == 0).sum()):
            per.set_title(f"Images per identity, {without:,} with none are left out")
    else:
        per.xaxis.set_major_locator(MaxNLocator(integer=True))
    _histogram(size, contents.bytes_N / 1024, 50, "images")
    size.set(title="Size of the JPEG images", xlabel="KiB")
    return figure


def _bins(largest: int, is_long: bool) -> list[float]:
    """Edges between whole numbers; of a long tail from 1 on, each bin a quarter wider at least."""
    if not is_long:
        step = -(-(largest + 1) // 50)
        edges: list[float] = (np.arange(0, largest + step + 1, step) - 0.5).tolist()
        return edges
    edges = [0.5]
    while edges[-1] < largest:
        edges.append(edges[-1] + max(1, int(edges[-1] / 4)))
    return edges


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
        layout=ConstrainedLayoutEngine(h_pad=0.12),
        figsize=(max(4.0, 0.8 * columns), 0.5 + 1.05 * len(rows)),
    )
    figure.suptitle(f"{pack.path.name}: identities and their images", x=0.01, ha="left")
    for row, identity in enumerate(rows.tolist()):
        start = int(contents.images_C[:identity].sum())
        images = order_N[start : start + contents.images_C[identity]][:columns]
        for column in range(columns):
            axes[row, column].set_axis_off()
            if column < len(images):
                _show(axes[row, column], pack.jpeg(int(images[column])))
        name = axes[row, 0].annotate(
            contents.called(identity),
            (0, 1),
            (0, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            parse_math=False,
        )
        name.set_in_layout(False)  # a long one goes on above the images beside it
    return figure


def _histogram(axes: Axes, values: NDArray[np.number], bins: int | list[float], unit: str) -> None:
    median = float(np.median(values))
    axes.hist(values, bins=bins, color=BLUE)
    axes.axvline(median, color=ORANGE, linewidth=1.5, label=f"median {median:.4g}")
    axes.set_ylabel(unit)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _plain(*every: Axis) -> None:
    """Whole numbers as people write them along logarithmic axes, not powers of ten."""
    for axis in every:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())


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
