"""Find wrongly labelled training images with the sub-centers of a finished run.

    partialfc clean runs/subcenter --out suspects

The run must have head.margin.name = "subcenter_arcface". Most images of an identity gather at one
of its centers, the dominant one; an image further than --degrees from it is a suspect (75 in
https://www.ecva.net/papers/eccv_2020/papers_ECCV/papers/123560715.pdf). OUT gets suspects.csv with
the sample's place in the run's data, its identity and the angle, largest angle first; the same as
suspects.jsonl, a list that training leaves out (data.skip); and angles.png. The packs are not
changed.
"""

# Shape suffixes: N = images, K = centers of an identity, D = embedding.

import csv
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.writing import atomic_write

mpl.use("Agg")

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from partialfc.config import ConfigError
from partialfc.data.dataset import DataSet
from partialfc.data.skip_list import write_skip_list
from partialfc.head.centers import stored_centers
from partialfc.training.open_run import OpenRun, open_run

CHUNK = 8192


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("clean", __doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    add_plugin_option(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--degrees", type=float, default=75.0, help="largest angle kept (75)")
    options = parser.parse_args(arguments)
    if not 0 < options.degrees < 180:
        parser.error(f"--degrees must be in (0, 180), got {options.degrees}.")
    with open_run(options.run) as run:
        if run.model.head.centers_per_identity < 2:
            raise ConfigError(
                f"{options.run}: its margin {run.config.head.margin.name!r} has one center an "
                'identity; train with head.margin.name = "subcenter_arcface".'
            )
        if run.dataset.most is not None:
            raise ConfigError(
                f"{options.run}: its data.labels may give an image several identities, or none, "
                "and which of them is wrong is not asked here. Train with one label an image."
            )
        degrees = angles_to_dominant(run)
        dataset = run.dataset
        identities = dataset.identities(np.arange(len(dataset)))
    options.out.mkdir(parents=True, exist_ok=True)
    suspects = write(options.out / "suspects.csv", degrees, identities, options.degrees)
    write_skip_list(
        options.out / "suspects.jsonl",
        (
            dataset.bad(i, f"{degrees[i]:.2f} degrees from identity {identities[i]}")
            for i in np.flatnonzero(degrees > options.degrees).tolist()
        ),
    )
    draw(options.out / "angles.png", degrees, options.degrees)
    print(
        f"{suspects:,} of {len(degrees):,} images are further than {options.degrees:g} degrees "
        f"from the dominant center: {options.out / 'suspects.csv'}, {options.out / 'angles.png'}"
    )
    return 0


def angles_to_dominant(run: OpenRun) -> np.ndarray:
    """Return the angle in degrees of every image to the dominant center of its identity."""
    head, pack = run.model.head, run.dataset
    centers = stored_centers(head.centers, head.optimizer.states())
    unit = F.normalize(centers).view(-1, head.centers_per_identity, centers.shape[1])
    identities = torch.from_numpy(pack.identities(np.arange(len(pack))))
    cosines = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("embedding", total=len(pack))
        for start in range(0, len(pack), CHUNK):
            stop = min(start + CHUNK, len(pack))
            records = range(start, stop)
            embeddings = run.evaluation.embed(
                run.model, "train", len(records), _jpeg(pack, records)
            )
            unit_ND = F.normalize(torch.from_numpy(embeddings).float())
            cosines.append((unit[identities[start:stop]] @ unit_ND.unsqueeze(2)).squeeze(2))
            progress.advance(task, stop - start)
    cosine_NK = torch.cat(cosines)
    dominant_N = dominant(cosine_NK, identities, len(unit))[identities]
    own_N = cosine_NK.gather(1, dominant_N.unsqueeze(1)).squeeze(1)
    degrees: np.ndarray = own_N.clamp(-1, 1).acos().rad2deg().numpy()
    return degrees


def _jpeg(pack: DataSet, records: range) -> Callable[[int], bytes]:
    return lambda i: pack.jpeg(records[i])


def dominant(cosine_NK: Tensor, identity_N: Tensor, count: int) -> Tensor:
    """Return which of its K centers most images of each identity are nearest to; [count]."""
    nearest_N, centers = cosine_NK.argmax(1), cosine_NK.shape[1]
    votes = torch.bincount(identity_N * centers + nearest_N, minlength=count * centers)
    return votes.view(count, centers).argmax(1)


def write(path: Path, degrees: np.ndarray, identities: np.ndarray, limit: float) -> int:
    """Write the suspects, the furthest first; return their number."""
    order = np.argsort(-degrees, kind="stable")
    suspects = order[degrees[order] > limit]
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["record", "identity", "degrees"])
        for index in suspects.tolist():
            writer.writerow([index, int(identities[index]), f"{degrees[index]:.2f}"])
    return len(suspects)


def draw(path: Path, degrees: np.ndarray, limit: float) -> None:
    """Write the histogram of the angles, with the limit."""
    figure, panel = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    panel.hist(degrees, bins=list(range(0, 182, 2)), color="#2563eb", alpha=0.7)
    panel.axvline(limit, color="#e0583b")
    panel.annotate(
        f"suspects: {np.mean(degrees > limit):.1%}", (limit, 1), xytext=(6, -4),
        xycoords=("data", "axes fraction"), textcoords="offset points", va="top", color="#e0583b",
    )  # fmt: skip
    panel.set(xlabel="degrees to the dominant center", ylabel="images")
    panel.set_xticks(range(0, 181, 30))
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
