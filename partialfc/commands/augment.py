"""Draw what training sees: images of a run's data in several epochs, or each change on its own.

    partialfc augment configs/demo.toml data.augment.rotate=0.5 --out sheet.png
    partialfc augment configs/demo.toml --each --out sheet.png

A row is an image, as it is stored and then in nine epochs, changed as the settings say. With --each
a row is one change, made to every image with the settings' strength. The images come from the run's
own loader.
"""

# Shape suffix: B = images asked for.

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import matplotlib as mpl

from partialfc.commands._command import command_parser

mpl.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from numpy.typing import NDArray

from partialfc.config import Config, ConfigError, load
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import DataSet
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.order import Order, Samples
from partialfc.definitions.augment import CHANGES
from partialfc.training.data import augmentation_of
from partialfc.training.images import open_images

ROWS, COLUMNS = 8, 10


class Chosen:
    """An arrangement of the same few images in every epoch, in their order."""

    def __init__(self, sample_ids: NDArray[np.int64]) -> None:
        self._ids = sample_ids
        self.size = len(sample_ids)

    def at(self, seed: int, epoch: int, position_B: NDArray[np.int64]) -> Samples:
        """Return the images at positions."""
        return Samples(self._ids[position_B], np.zeros_like(position_B))

    def check(self, global_batch: int) -> None:
        """Any batch can be made."""


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("augment", __doc__)
    parser.add_argument("config", type=Path, help="settings of a run, TOML")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a .png")
    parser.add_argument("--each", action="store_true", help="a row for each change")
    options = parser.parse_intermixed_args(arguments)
    config = load(options.config, options.overrides)
    if config.data.kind == "arrays":
        raise ConfigError(
            'data.kind = "arrays": nothing is changed at random, and there are no images.'
        )
    dataset = open_images(config)
    (draw_each if options.each else draw_epochs)(config, dataset, options.out)
    return 0


def draw_epochs(config: Config, dataset: DataSet, out: Path) -> None:
    """Draw some images, as they are and in nine epochs."""
    ids = np.linspace(0, len(dataset) - 1, min(ROWS, len(dataset))).astype(np.int64)
    plain = batches(config, dataset, ids, Augmentation(flip=0), 1)
    changed = batches(config, dataset, ids, augmentation_of(config), 9)
    titles = ["stored", *(f"epoch {epoch}" for epoch in range(9))]
    sheet(out, np.concatenate([plain, changed]).swapaxes(0, 1), titles, [str(i) for i in ids])


def draw_each(config: Config, dataset: DataSet, out: Path) -> None:
    """Draw every change with probability 1, and none in the first row."""
    ids = np.linspace(0, len(dataset) - 1, min(COLUMNS, len(dataset))).astype(np.int64)
    none = dict.fromkeys(CHANGES, 0.0)
    still = replace(augmentation_of(config), flip=0, shift=0, **none)  # type: ignore[arg-type]
    augmentations = {"stored": still}
    for name in CHANGES:
        augmentations[name] = replace(still, **{name: 1.0})  # type: ignore[arg-type]
    augmentations["shift 8"] = replace(still, shift=8)
    augmentations["flip"] = replace(still, flip=1)
    rows = [batches(config, dataset, ids, a, 1)[0] for a in augmentations.values()]
    sheet(out, np.stack(rows), [str(i) for i in ids], list(augmentations))


def batches(
    config: Config, dataset: DataSet, ids: NDArray[np.int64], augmentation: Augmentation, count: int
) -> NDArray[np.float32]:
    """Return images [count, len(ids), S, S, 3] in [0, 1], those of ``count`` epochs."""
    stream = Stream(
        dataset=dataset,
        order=Order(len(dataset), len(ids), config.run.seed, arrangement=Chosen(ids)),
        augmentation=augmentation,
        image_size=config.data.image_size,
    )
    opened = open_batches(stream, 0, device=torch.device("cpu"), loader=config.data.loader)
    with closing(opened):
        images = np.stack([batch.images.numpy() for batch in islice(opened, count)])
    return np.clip(images.transpose(0, 1, 3, 4, 2) * 0.5 + 0.5, 0, 1)


def sheet(out: Path, images: NDArray[np.float32], columns: list[str], rows: list[str]) -> None:
    """Write images [rows, columns, S, S, 3] with their names."""
    figure, axes = pyplot.subplots(
        len(rows), len(columns), squeeze=False, layout="constrained",
        figsize=(0.9 * len(columns) + 0.8, 0.95 * len(rows) + 0.2),
    )  # fmt: skip
    for row, name in enumerate(rows):
        for column, title in enumerate(columns):
            panel = axes[row, column]
            panel.imshow(images[row, column], interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
            if row == 0:
                panel.set_title(title, fontsize=8)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)
