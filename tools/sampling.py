"""What sampling costs in accuracy: sample rates by kinds of negatives by seeds, one settings file.

    python tools/sampling.py configs/omniglot.toml --rates 1,0.1 --seeds 1,2,3 --json OUT.json \
        data.global_batch=64 run.epochs=2
    python tools/sampling.py --table OUT.json OTHER.json --page OUT.html

All of it runs in this process, on one rank. The images of data.train and of the first held-out sets
are decoded once and stay in memory; the model and its steps are those of ``partialfc train``. Seed
after seed is trained in the order of the list, so what is there after any time compares like with
like: the runs of a seed begin with the same weights and see the same images. At a rate of 1 all
kinds of negatives are one, trained as uniform. OUT.json is written after every run, and the same
command goes on after the last one. Words of the form key=value go to all runs, head.nearest to
those that have it. A setting that would change the result and is not followed here, such as
data.augment, is refused.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partialfc.config import Config, ConfigError, load
from partialfc.data.images.formats import decode_image, resize
from partialfc.data.packs.pack import open_pack
from partialfc.data.sets.pairs import Image, read_pairs
from partialfc.keyed import key, permute, uniform
from partialfc.model.build import Model, build
from partialfc.model.step import train_step
from partialfc.protocols.identification import first_of_each, rank_k
from partialfc.protocols.verification import verify
from partialfc.runtime.process import Runtime, running
from partialfc.training.schedule import learning_rate
from partialfc.writing import write_json
from tools._sampling.page import COLUMNS, cells, write
from tools.bench.conditions import conditions
from tools.bench.text import table

Row = dict[str, Any]
Pixels = NDArray[np.uint8]

_AT_ONCE = 256
"""Held-out images in one forward pass."""

_NOT_FOLLOWED = (
    *("run.start_from", "run.resume_from", "stages", "heads", "head.start", "head.several"),
    *("data.kind", "data.skip", "data.augment", "data.last_batch", "data.images_per_identity"),
    *("data.block", "data.sets", "data.labels", "data.label_weights"),
    *("backbone.pretrained", "losses.teacher"),
)
"""Settings that change what is trained, and that only ``partialfc train`` follows."""


@dataclass(frozen=True, slots=True)
class Data:
    """Everything that a run looks at, decoded: pixels are uint8 [n, S, S, 3].

    Attributes:
        images: To train on, with a border of ``shift`` pixels.
        identities: Theirs, int64.
        count: Of the identities.
        probes: The identification set, and its identities.
        pairs: The verification set, and which pairs show one identity.
    """

    images: Pixels
    identities: NDArray[np.int64]
    count: int
    probes: tuple[Pixels, NDArray[np.int64]]
    pairs: tuple[Pixels, NDArray[np.bool_]]


def main(arguments: list[str] | None = None) -> int:
    """Train what is not in the record yet, and print its table."""
    options = _parser().parse_intermixed_args(arguments)
    if options.table:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in options.table]
        print("\n\n".join(shown(record["rows"]) for record in records))
        if options.page:
            names = (path.stem for path in options.table)
            write(options.page, [*zip(names, records, strict=True)])
        return 0
    if options.page:
        raise SystemExit("--page is of records: name them with --table.")
    if options.config is None or options.json is None:
        raise SystemExit("give a settings file and --json, or --table with a record.")
    asked = {"config": options.config, "words": options.words}
    record: Row = {**conditions(), **asked, "rows": []}
    if options.json.exists():
        record = json.loads(options.json.read_text(encoding="utf-8"))
        if {name: record[name] for name in asked} != asked:
            raise SystemExit(f"{options.json} is of other settings. Choose another --json.")
    rows: list[Row] = record["rows"]
    done = {(row["seed"], row["rate"], row["negatives"]) for row in rows}
    data: Data | None = None
    try:
        every = {
            run: followed(options.config, options.words, *run)
            for run in runs(options.seeds, options.rates, options.negatives)
        }
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    for (seed, rate, negatives), config in every.items():
        if (seed, rate, negatives) in done:
            continue
        data = data or decoded(config)
        row = {"seed": seed, "rate": rate, "negatives": negatives, **measured(config, data)}
        rows.append(row)
        write_json(options.json, record)
        sys.stderr.write(f"{row}\n")
    print(shown(rows))
    return 0


def runs(seeds: str, rates: str, negatives: str) -> list[tuple[int, float, str]]:
    """Return (seed, rate, kind of negatives) in the order of training; at a rate of 1 one kind."""
    every = product(map(int, seeds.split(",")), map(float, rates.split(",")), negatives.split(","))
    return list(
        dict.fromkeys((seed, rate, kind if rate < 1 else "uniform") for seed, rate, kind in every)
    )


def followed(path: str, words: list[str], seed: int, rate: float, negatives: str) -> Config:
    """Return the settings of a run.

    Raises:
        ConfigError: If they are none, or with every one that a run here would not follow.
    """
    words = [word for word in words if negatives == "nearest" or not _is_near(word)]
    words += [f"run.seed={seed}", f"head.sample_rate={rate}", f"head.negatives={negatives}"]
    config = load(path, words)
    wrong = [key for key in _NOT_FOLLOWED if not _is_left_out(config, key)]
    wrong += ["verification.flip = true"] * config.verification.flip
    wrong += ["data.train of several sources"] * (len(config.data.train) > 1)
    if wrong:
        raise ConfigError(f"tools/sampling.py does not follow {', '.join(wrong)}. Remove them.")
    for kind in ("pairs", "identification"):
        if not getattr(config.verification, kind):
            raise ConfigError(f"verification.{kind}: names no set. Name one to measure.")
    return config


def _is_left_out(config: Config, key: str) -> bool:
    """Whether a setting is as it is where no file names it."""
    *sections, name = key.split(".")
    section: Any = config
    for one in sections:
        section = getattr(section, one)
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(section, name) == default)


def _is_near(word: str) -> bool:
    return word.startswith("head.nearest.")


def decoded(config: Config) -> Data:
    """Read and decode all sets of the settings."""
    train, held_out = config.data.train[0], config.verification
    pack, probes = open_pack(train), open_pack(held_out.identification[0])
    pairs = read_pairs(held_out.pairs[0])
    size, border = config.data.image_size, config.data.shift
    images = _pixels([pack.jpeg(i) for i in range(len(pack))], size)
    every = np.arange(len(probes))
    return Data(
        images=np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)), mode="edge"),
        identities=pack.identities(np.arange(len(pack))),
        count=pack.num_identities,
        probes=(_pixels([probes.jpeg(int(i)) for i in every], size), probes.identities(every)),
        pairs=(_pixels(pairs.images, size), pairs.same),
    )


def _pixels(images: Any, size: int) -> Pixels:
    def one(image: Image) -> Pixels:
        whole = image
        if isinstance(image, bytes):
            whole = decode_image(np.frombuffer(image, np.uint8))
        return resize(np.asarray(whole), size)

    return np.stack([one(image) for image in images])


def measured(config: Config, data: Data) -> Row:
    """Train one model; return its accuracy among unseen identities, and what a step took."""
    with running(config) as runtime:
        model = build(config, runtime, data.count)
        started, losses = time.process_time(), []
        batch = config.data.global_batch
        an_epoch = len(data.images) // batch
        steps = config.run.steps or round((config.run.epochs or 1) * an_epoch)
        for step in range(steps):
            which = _images_of(config, step, an_epoch, len(data.images))
            rate = learning_rate(
                step,
                peak=config.optimizer.lr,
                total_steps=steps,
                **config.schedule.model_dump(),
            )
            images = _changed(data.images, which, step, config)
            identities = torch.from_numpy(data.identities[which])
            found = train_step(model, config, images, identities, rate)
            losses.append(found.loss.item())
        seconds = (time.process_time() - started) / steps
        return {
            **_accuracy(model, data, runtime),
            "loss": statistics.mean(losses[-100:]),
            "steps": steps,
            "cpu_seconds_of_a_step": seconds,
        }


def _images_of(config: Config, step: int, an_epoch: int, count: int) -> NDArray[np.int64]:
    """The images of a step: a part of the epoch's permutation."""
    epoch, place = divmod(step, an_epoch)
    batch = config.data.global_batch
    index = np.arange(place * batch, (place + 1) * batch)
    return permute(index, count, key(config.run.seed, "order", epoch))


def _changed(images: Pixels, which: NDArray[np.int64], step: int, config: Config) -> Tensor:
    """Images of a batch in [-1, 1], moved and mirrored as the settings say."""
    seed, size, places = config.run.seed, config.data.image_size, 2 * config.data.shift + 1
    top, left = (
        (uniform(which, key(seed, axis, step)) * places).astype(np.int64) for axis in ("y", "x")
    )
    is_mirrored = uniform(which, key(seed, "flip", step)) < config.data.flip
    chosen = np.stack(
        [
            images[i, y : y + size, x : x + size][:, :: -1 if mirrored else 1]
            for i, y, x, mirrored in zip(which, top, left, is_mirrored, strict=True)
        ]
    )
    return _normal(chosen)


def _normal(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _accuracy(model: Model, data: Data, runtime: Runtime) -> Row:
    """Rank 1 with the first image of each identity as gallery, and ten-fold verification."""

    @torch.inference_mode()
    def embeddings(pixels: Pixels) -> NDArray[np.float64]:
        parts = np.split(pixels, range(_AT_ONCE, len(pixels), _AT_ONCE))
        found = [model.embed(_normal(part).to(runtime.device), model.backbone) for part in parts]
        return torch.cat(found).double().cpu().numpy()

    model.backbone.eval()
    images, identities = data.probes
    with model.measured():
        of_probes, of_pairs = embeddings(images), embeddings(data.pairs[0])
    gallery, probes = first_of_each(identities)
    ranked = rank_k(of_probes[gallery], identities[gallery], of_probes[probes], identities[probes])
    verified = verify(of_pairs, data.pairs[1])
    accepted = verified.tar_at_far[1e-3]
    return {
        "rank_1": ranked.rate[1],
        "verification": verified.accuracy,
        "tar_at_far_1e-3": accepted if accepted == accepted else None,  # too few pairs
    }


def shown(rows: list[Row]) -> str:
    """Return the table of a record, as text."""
    title = "Unseen identities, in points"
    return table(title, COLUMNS, cells(rows), left=("negatives",))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--rates", default="1,0.3,0.1,0.03", help="sample rates; a list")
    parser.add_argument("--negatives", default="uniform,weighted,nearest", help="kinds; a list")
    parser.add_argument("--seeds", default="1,2,3", help="a list")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the record")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="print records")
    parser.add_argument("--page", type=Path, metavar="HTML", help="a page of these records")
    return parser


if __name__ == "__main__":
    sys.exit(main())
