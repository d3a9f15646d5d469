"""Draw what margins do to embeddings: a small network on real digits, in two and three dimensions.

    python tools/geometry.py OUT

trains on scikit-learn's bundled handwritten digits once for every margin of a list and writes
circles.png (embeddings and class centers in two dimensions), spheres.png (the same in three),
angles.png (angles of pairs of one digit and of two), boundaries.png (where a sample changes sides,
by its angles to two centers) and geometry.json (the numbers it prints). Half of the images are held
out; pictures and numbers are of those. About two minutes on two cores.

Shape suffixes: N = images, C = digits, D = embedding.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from partialfc import PartialFC, RowAdamW
from partialfc.margins import (
    ArcFace,
    CosFace,
    FNormSphereFace,
    Margin,
    NormalizedSoftmax,
    Softmax,
)
from partialfc.margins.guidance import curve

DIGITS, SCALE = 10, 16.0
FAMILIES: dict[str, dict[str, Margin]] = {
    "no margin": {
        "softmax": Softmax(),
        "NSL": NormalizedSoftmax(scale=SCALE),
        "SphereFace m = 2": FNormSphereFace(scale=SCALE, multiplicative=2),
    },
    "CosFace": {f"CosFace m = {m}": CosFace(scale=SCALE, additive=m) for m in (0.1, 0.2, 0.35)},
    "ArcFace": {f"ArcFace m = {m}": ArcFace(scale=SCALE, angular=m) for m in (0.1, 0.3, 0.5)},
}
MARGINS = {label: margin for family in FAMILIES.values() for label, margin in family.items()}
COLOURS = pyplot.get_cmap("tab10")(range(DIGITS))
INK, MUTED, BLUE, CORAL = "#1f2933", "#7b8794", "#2563eb", "#e0583b"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a network made of the held-out images.

    Shape suffixes: N = images, D = embedding, C = digits.

    Attributes:
        unit_ND: Unit embeddings.
        digit_N: What they show.
        center_CD: Unit class centers.
        numbers: Angles in degrees and accuracy.
    """

    unit_ND: Tensor
    digit_N: Tensor
    center_CD: Tensor
    numbers: dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=800, help="training steps of each (800)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a step is too small to share
    images, digits = load_digits()
    found: dict[int, dict[str, Trained]] = {2: {}, 3: {}}
    jobs = [(dim, label) for dim in found for label in MARGINS]
    for dim, label in track(jobs, "training", console=Console(stderr=True)):
        found[dim][label] = train(
            MARGINS[label], dim, images, digits, steps=options.steps, seed=options.seed
        )
    numbers = {
        f"{dim} dimensions": {label: trained.numbers for label, trained in by_label.items()}
        for dim, by_label in found.items()
    }
    (options.out / "geometry.json").write_text(
        json.dumps(numbers, indent=1) + "\n", encoding="utf-8"
    )
    for name, figure in (
        ("circles.png", circles(found[2])),
        ("spheres.png", spheres(found[3])),
        ("angles.png", angles(found[3])),
        ("boundaries.png", boundaries()),
    ):
        figure.savefig(options.out / name, dpi=90)
        pyplot.close(figure)
    show(numbers)
    return 0


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the 1,797 images [N, 64] in [-1, 1] and their digits [N]."""
    from sklearn import datasets

    bundle: Any = datasets.load_digits()
    images = torch.from_numpy(bundle.data).float() / 8 - 1
    return images, torch.from_numpy(bundle.target).long()


def train(
    margin: Margin, dim: int, images: Tensor, digits: Tensor, *, steps: int, seed: int
) -> Trained:
    """Train on the images at even places, and look at those at odd ones."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.PReLU(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.PReLU(),
        nn.Linear(128, dim),
    )  # fmt: skip
    head = PartialFC(DIGITS, dim, margin, optimizer=RowAdamW(lr=0.01, weight_decay=0.0), seed=seed)
    nn.init.normal_(head.centers[:, :dim], generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3, weight_decay=1e-2)
    seen, seen_digits = images[0::2], digits[0::2]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        head.optimizer.param_groups[0]["lr"] = 0.01 * rate
        rows = torch.randint(0, len(seen), (256,), generator=generator)
        noisy = seen[rows] + 0.1 * torch.randn(256, 64, generator=generator)
        loss = head(backbone(noisy), seen_digits[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.optimizer.step()
    backbone.eval()
    with torch.inference_mode():
        unit_ND = F.normalize(backbone(images[1::2]))
    center_CD = F.normalize(head.centers.detach()[:, :dim])
    return Trained(unit_ND, digits[1::2], center_CD, numbers_of(unit_ND, digits[1::2], center_CD))


def numbers_of(unit_ND: Tensor, digit_N: Tensor, center_CD: Tensor) -> dict[str, float]:
    """Return mean angles in degrees: to the own class's mean, between pairs; and accuracy."""
    mean_CD = F.normalize(torch.stack([unit_ND[digit_N == c].mean(0) for c in range(DIGITS)]))
    own_N = (unit_ND * mean_CD[digit_N]).sum(1).clamp(-1, 1).acos().rad2deg()
    same, different = pairs(unit_ND, digit_N)
    nearest = (mean_CD @ mean_CD.T).fill_diagonal_(-2).amax(1).clamp(-1, 1).acos().rad2deg()
    return {
        "spread": float(own_N.mean()),
        "same_digit": float(same.mean()),
        "different_digits": float(different.mean()),
        "nearest_class": float(nearest.mean()),
        "accuracy": float(((unit_ND @ center_CD.T).argmax(1) == digit_N).double().mean()),
    }


def pairs(unit_ND: Tensor, digit_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the angles in degrees of all pairs of one digit, and of two digits."""
    first, second = torch.triu_indices(len(unit_ND), len(unit_ND), 1)
    degrees = (unit_ND @ unit_ND.T)[first, second].clamp(-1, 1).acos().rad2deg()
    same = digit_N[first] == digit_N[second]
    return degrees[same], degrees[~same]


def circles(found: dict[str, Trained]) -> Figure:
    """Embeddings on the unit circle, spread outwards by chance; centers as rays."""
    figure, axes = pyplot.subplots(3, 3, figsize=(11, 11.6), layout="constrained")
    jitter = np.random.default_rng(0)
    for panel, (label, trained) in zip(axes.flat, found.items(), strict=True):
        radius = 1 + 0.16 * jitter.random(len(trained.unit_ND))
        points = trained.unit_ND.numpy() * radius[:, None]
        panel.scatter(*points.T, c=COLOURS[trained.digit_N], s=5, linewidths=0, alpha=0.7)
        for digit, (x, y) in enumerate(trained.center_CD.tolist()):
            panel.plot([0, x], [0, y], color=COLOURS[digit], linewidth=1.2)
            panel.text(0.86 * x, 0.86 * y, str(digit), fontsize=8, ha="center", va="center")
        panel.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
        panel.set_axis_off()
        panel.set_title(caption(label, trained), fontsize=9, color=INK)
    return figure


def spheres(found: dict[str, Trained]) -> Figure:
    """Embeddings on the unit sphere, those behind it faint; centers as rays."""
    figure = pyplot.figure(figsize=(11, 11.6), layout="constrained")
    for place, (label, trained) in enumerate(found.items()):
        panel: Any = figure.add_subplot(3, 3, place + 1, projection="3d")
        longitude, latitude = np.mgrid[0 : 2 * np.pi : 25j, 0 : np.pi : 13j]
        sphere = (
            np.cos(longitude) * np.sin(latitude),
            np.sin(longitude) * np.sin(latitude),
            np.cos(latitude),
        )
        panel.plot_wireframe(*sphere, color="#d9dee4", linewidth=0.3)
        panel.scatter(*trained.unit_ND.numpy().T, c=COLOURS[trained.digit_N], s=4, linewidths=0)
        for digit, center in enumerate(trained.center_CD.tolist()):
            panel.plot(*([0, value] for value in center), color=COLOURS[digit], linewidth=1)
            panel.text(*(1.2 * value for value in center), str(digit), fontsize=8)
        panel.set_box_aspect((1, 1, 1), zoom=1.45)
        panel.set_axis_off()
        panel.set_title(caption(label, trained), fontsize=9, color=INK)
    return figure


def angles(found: dict[str, Trained]) -> Figure:
    """Histograms of the angles of pairs."""
    figure, axes = pyplot.subplots(
        3, 3, figsize=(11, 7), sharex=True, sharey=True, layout="constrained"
    )
    edges = np.arange(0, 182, 2)
    for panel, (label, trained) in zip(axes.flat, found.items(), strict=True):
        for degrees, colour in zip(
            pairs(trained.unit_ND, trained.digit_N), (BLUE, CORAL), strict=True
        ):
            counts, _ = np.histogram(degrees.numpy(), edges)
            panel.stairs(counts / counts.sum(), edges, fill=True, color=colour, alpha=0.55)
        panel.set_title(label, fontsize=9, loc="left", color=INK)
        panel.set_xticks(range(0, 181, 30))
        plain(panel)
    figure.supxlabel("angle of a pair, degrees; blue: one digit, red: two digits", fontsize=9)
    return figure


def boundaries() -> Figure:
    """Which side a sample is on, by its angles to two centers: to be class 1 or 2 in training."""
    kinds: dict[str, Margin] = {
        "softmax, ||w1|| = 1.5 ||w2||": Softmax(),
        "NSL": NormalizedSoftmax(scale=SCALE),
        "SphereFace m = 2": FNormSphereFace(scale=SCALE, multiplicative=2),
        "CosFace m = 0.35": CosFace(scale=SCALE, additive=0.35),
        "ArcFace m = 0.5": ArcFace(scale=SCALE, angular=0.5),
    }
    figure, axes = pyplot.subplots(1, 5, figsize=(13, 3), layout="constrained", sharey=True)
    degrees = np.linspace(0, 120, 481)
    theta = torch.from_numpy(np.radians(degrees)).float()
    for panel, (label, margin) in zip(axes, kinds.items(), strict=True):
        length = 1.5 if isinstance(margin, Softmax) else 1.0
        positive = curve(margin, theta, 1.0)
        plain_logit = positive.scale * theta.cos()
        first = (length * positive.logit_N)[None, :] > plain_logit[:, None]  # columns: theta 1
        second = positive.logit_N[:, None] > (length * plain_logit)[None, :]
        side = first.int() - second.int()
        colours = mpl.colors.ListedColormap(["#f7c9bd", "#ffffff", "#bfd3f7"])
        panel.pcolormesh(degrees, degrees, side.numpy(), cmap=colours, vmin=-1, vmax=1)
        panel.plot(degrees, degrees, color=MUTED, linewidth=0.8, linestyle=":")
        panel.set_title(label, fontsize=9, color=INK)
        panel.set(aspect="equal", xlabel="θ1, degrees")
        panel.set_xticks(range(0, 121, 30))
        panel.set_yticks(range(0, 121, 30))
        plain(panel)
    axes[0].set_ylabel("θ2, degrees")
    return figure


def caption(label: str, trained: Trained) -> str:
    """Return the label with what its picture shows as numbers."""
    numbers = trained.numbers
    return (
        f"{label}\nspread {numbers['spread']:.1f}°, nearest class {numbers['nearest_class']:.0f}°"
    )


def plain(panel: Axes) -> None:
    """Take away what is not data."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8, colors=MUTED)


def show(numbers: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the numbers."""
    for name, by_label in numbers.items():
        table = Table("", "spread", "pairs of one digit", "of two", "nearest class", "accuracy")
        table.title = f"{name}, angles in degrees"
        form: Callable[[float], str] = "{:.1f}".format
        for label, found in by_label.items():
            columns = ("spread", "same_digit", "different_digits", "nearest_class")
            table.add_row(
                label, *(form(found[column]) for column in columns), f"{found['accuracy']:.4f}"
            )
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
