"""Measure a model on held-out sets: a table, a JSON file and a picture.

    partialfc evaluate runs/mine lfw.bin cfp_fp.bin agedb_30.bin --out results
    torchrun --nproc-per-node=8 -m partialfc evaluate model.pt IJBC all:mfr.rec --out results
    partialfc evaluate runs/mine open:known.rec,strangers.rec megaface --compat insightface

MODEL is a run's folder, a checkpoint of it, or a model.pt, backbone.pth or .safetensors. A SET is a
.bin of pairs, a .rec pack (closed-set identification), a folder of IJB-B, IJB-C or MegaFace in
insightface's layout, all:PACK.rec (all-to-all 1:1), open:KNOWN.rec,STRANGERS.rec, or a list of
pairs and the folder of its images: pairs:pairsDevTest.txt,aligned for LFW,
pairs:cfp/Protocol/Split/FP,aligned for CFP. One that cannot be measured is named first; the others
are measured, and the exit status is 2. Under torchrun all ranks share the images; neither their
number nor --batch changes a digit on machines alike.

--out gets results.json and results.png, people.csv with how each person of a pack was found, and
pairs.csv with each pair of a list; people have the names that partialfc pack keeps.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from partialfc.checkpoint.trained_backbone import TrainedBackbone, open_backbone
from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.commands._evaluate import picture
from partialfc.commands._evaluate.people import write_pairs, write_people
from partialfc.commands._evaluate.sets import KINDS, Measured, Set, Ways, open_set_of
from partialfc.commands._numbers import positive
from partialfc.config import Config, ConfigError
from partialfc.data.sets.pairs import Image
from partialfc.evaluation.embedding import BLOCK, embed_images
from partialfc.protocols.templates import Modes
from partialfc.records.metrics import finite
from partialfc.runtime.place import own_place
from partialfc.runtime.process import Runtime, running
from partialfc.writing import write_json

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    trained = open_backbone(options.model, image_size=options.image_size)
    trained.require_images()
    flip = trained.config.verification.flip if trained.config else True
    flip = flip if options.flip is None else options.flip
    modes = Modes(keep_norms=options.norms, detector=options.detector)
    targets = tuple(float(word) for word in options.far.split(","))
    ways = Ways(flip, modes, options.compat, targets)
    sets, refused = _open(options.sets, ways)
    with running(settings_of(options.device)) as runtime:
        if runtime.leads:
            for error in refused:
                print(f"not measured: {error}", file=sys.stderr, flush=True)
        found = measure(trained, sets, runtime, flip, options)
        if runtime.leads:
            _write(options, trained, flip, found)
    return 2 if refused else 0


def _open(words: list[str], ways: Ways) -> tuple[list[Set], list[ConfigError]]:
    """Open the sets, and say which cannot be; raise if none can."""
    sets: dict[str, Set] = {}
    refused = []
    for word in words:
        if word in sets:
            raise ConfigError(f"sets: {word} is there twice; name it once.")
        try:
            sets[word] = open_set_of(word, ways)
        except ConfigError as error:
            refused.append(error)
    if not sets:
        raise refused[0]
    return apart(list(sets.values()), list(sets)), refused


def apart(sets: list[Set], words: list[str]) -> list[Set]:
    """Return the sets by names that differ: where several have one, by file name, or by word."""
    for names in ([Path(word.split(",")[0]).name for word in words], words):
        times = Counter(one.name for one in sets)
        sets = [
            replace(one, name=name) if times[one.name] > 1 else one
            for one, name in zip(sets, names, strict=True)
        ]
    return sets


def measure(
    trained: TrainedBackbone,
    sets: list[Set],
    runtime: Runtime,
    flip: bool,
    options: argparse.Namespace,
) -> dict[str, Measured]:
    """Return the numbers of all sets. Collective."""
    embed = embedder(trained, runtime, options.precision)
    with Progress(console=Console(stderr=True), disable=not runtime.leads) as bar:

        def bar_of(name: str, total: int) -> Callable[[int], object]:
            started = bar.add_task(escape(name), total=total)
            return lambda done: bar.advance(started, done)

        def embed_set(name: str, count: int, image: Callable[[int], Image]) -> NDArray[np.float64]:
            return embed_images(
                embed,
                name,
                count,
                image,
                runtime,
                size=trained.known.image_size,
                flip=flip,
                batch=options.batch,
                threads=options.threads,
                progress=bar_of(name, -(-count // runtime.ranks.size)),
            )

        return {one.name: one.measure(embed_set, runtime, bar_of) for one in sets}


def embedder(
    trained: TrainedBackbone, runtime: Runtime, precision: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the backbone on the device of this rank, in a precision."""
    backbone, autocast = trained.backbone().to(runtime.device), AUTOCAST[precision]
    device = runtime.device.type

    def embed(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            embeddings: torch.Tensor = backbone(images)
        return embeddings

    return embed


def show(found: dict[str, Measured], console: Console) -> None:
    """Print a table: a row for every set, its protocol and its numbers."""
    table = Table(box=None, header_style="bold", title_justify="left")
    table.add_column("set", overflow="fold")
    table.add_column("protocol, mode and numbers", overflow="fold")
    for name, one in found.items():
        table.add_row(
            escape(name),
            "\n".join(
                [f"[bold]{one.protocol}", *lines_of(one.numbers), *map(escape, one.lines), ""]
            ),
        )
    console.print(table)


def lines_of(numbers: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the numbers as lines of text, a nested table as one."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, dict) and all(not isinstance(v, dict) for v in value.values()):
            items = ", ".join(f"{_key(k)}: {_text(v)}" for k, v in value.items())
            lines.append(f"{prefix}{name} {items}")
        elif isinstance(value, dict):
            lines += lines_of(value, f"{prefix}{name} ")
        else:
            lines.append(f"{prefix}{name} {_text(value)}")
    return lines


def _key(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:g}" if 0 < abs(value) <= 1e-3 else f"{value:.4f}"
    return str(value)


def _write(
    options: argparse.Namespace, trained: TrainedBackbone, flip: bool, found: dict[str, Measured]
) -> None:
    show(found, Console(width=110) if not sys.stdout.isatty() else Console())
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    model = {
        "name": trained.name,
        "backbone": trained.known.name,
        "embedding_dim": trained.known.embedding_dim,
        "step": trained.step,
        "precision": options.precision,
        "flip": flip,
        "block": BLOCK,
        "compat": options.compat,
    }
    sets = {name: finite(asdict(replace(one, pairs=[]))) for name, one in found.items()}
    people = {name: one.people for name, one in found.items() if one.people}
    pairs = {name: one.pairs for name, one in found.items() if one.pairs}
    if people:
        write_people(options.out / "people.csv", people)
    if pairs:
        write_pairs(options.out / "pairs.csv", pairs)
    write_json(options.out / "results.json", {"model": model, "sets": sets})
    picture.draw(options.out / "results.png", found, title=trained.name)
    drawn = ", " + str(options.out / "results.png") if any(
        one.curves or one.cmc for one in found.values()
    ) else ""  # fmt: skip
    print(f"{options.out / 'results.json'}{drawn}")


def settings_of(device: str) -> Config:
    """What a rank needs to join the others; nothing is trained."""
    return Config.model_validate(
        {
            "run": {"device": device},
            "data": {"train": "unused.rec", "global_batch": 2 * own_place().size},
            "precision": {"compute": "fp32"},
        }
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("model", type=Path, help="run, checkpoint or file of weights")
    add_plugin_option(parser)
    parser.add_argument("sets", nargs="+", help=f"paths, or KIND:path with {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--batch", type=positive, default=256, help="images decoded ahead (256)")
    parser.add_argument("--threads", type=positive, default=4, help="that decode, a rank (4)")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32", help="(fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto)")
    parser.add_argument("--image-size", type=positive, default=112, help="of a file's model (112)")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="add the mirrored image (as the run did; files: yes)",
    )
    parser.add_argument(
        "--norms", action=argparse.BooleanOptionalAction, default=True, help="IJB: N1 or N0"
    )
    parser.add_argument(
        "--detector", action=argparse.BooleanOptionalAction, default=True, help="IJB: D1 or D0"
    )
    parser.add_argument(
        "--compat",
        choices=("insightface",),
        help="its thresholds, not exact ones, and squared distances beside cosines",
    )
    parser.add_argument("--far", default="1e-6", help="targets of all:, with commas (1e-6)")
    return parser
