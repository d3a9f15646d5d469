"""Out to production: ONNX, INT8, torch.export, safetensors and a model card, each checked.

    partialfc export runs/mine exported --check lfw.bin
    partialfc export model.pt exported --check lfw.bin --formats onnx,fp16,int8 --inside
    partialfc export runs/mine exported --huggingface

MODEL is a run's folder, a checkpoint of it or a file of weights. Every file is run on the images of
--check (a .bin of pairs; left out, the run's first one) next to the original. onnx, pt2 and
safetensors are the original if every embedding has a cosine of at least 0.9999 with it and the
99 % interval of the paired change of accuracy has 0 in it; fp16 if it is 0.999 and the interval has
a change of at most 0.001 in it. What INT8 costs is measured and printed. Formats: onnx, fp16, int8,
pt2 (torch.export), safetensors.

--huggingface makes OUT a folder as the Hugging Face hub has models: config.json, model.safetensors,
preprocessor_config.json and the card as README.md with the hub's metadata on top. It needs no
network; ``hf upload NAME/REPOSITORY OUT`` is the hub's own command that sends it. Without --formats
there are no other files then.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from partialfc.checkpoint.foreign import read_backbone
from partialfc.checkpoint.hub_folder import write_hub_folder
from partialfc.checkpoint.trained_backbone import TrainedBackbone, open_backbone
from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.commands._export.card import front_matter, write_card
from partialfc.commands._export.check import Original, Run, calibration, check, original
from partialfc.config import ConfigError
from partialfc.data.sets.pairs import Pairs, read_pairs
from partialfc.writing import atomic_write

FILES = {
    "onnx": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
    "pt2": "model.pt2",
    "safetensors": "model.safetensors",
}
_ALL = ",".join(FILES)
ALLOWED = {"fp16": (0.999, 1e-3), "int8": (-1.0, 1.0)}
"""Smallest cosine to the original, and change of accuracy that is allowed; others: 0.9999, 0."""

NOT_IT = "NOT THE ORIGINAL"

CALIBRATED_ON = 512


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status: 1 if a file is not the original."""
    options = _parser().parse_args(arguments)
    formats = _formats(options.formats, options.huggingface)
    if {"onnx", "fp16", "int8"} & set(formats):
        import partialfc.commands._export.onnx_file  # noqa: F401  (is it all installed?)
    trained = open_backbone(options.model, image_size=options.image_size)
    trained.require_images()
    path = _check_set(options.check, trained)
    pairs = read_pairs(path)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = _exported(trained, options.out, formats, pairs, options.inside, options.huggingface)
    write_card(
        options.out / "README.md",
        trained,
        rows,
        inside=options.inside,
        licence=options.data_licence,
        checked_on=path.stem,
        flip=_flip(trained),
        front=front_matter(trained, rows) if options.huggingface else "",
    )
    return show(rows, options.out)


def _formats(asked: str | None, huggingface: bool) -> list[str]:
    """The formats that are asked for; without a word all, or those of a folder of the hub."""
    formats = ["safetensors"] if huggingface and asked is None else (asked or _ALL).split(",")
    if unknown := [word for word in formats if word not in FILES]:
        raise ValueError(f"--formats: {unknown[0]}: must be some of {_ALL}.")
    if huggingface and "safetensors" not in formats:
        raise ValueError("--formats: with --huggingface safetensors must be among them.")
    return formats


def _exported(
    trained: TrainedBackbone,
    out: Path,
    formats: list[str],
    pairs: Pairs,
    inside: bool,
    huggingface: bool,
) -> list[dict[str, Any]]:
    """Write the files and measure each; fp16 and int8 are made from the fp32 ONNX."""
    backbone, size = trained.backbone(), trained.known.image_size
    flip = _flip(trained)
    truth = original(backbone, pairs, size, flip)
    rows = []
    needs_onnx = {"onnx", "fp16", "int8"} & set(formats)
    with Console(stderr=True).status("exporting") as status:
        for name in sorted({*formats, *(["onnx"] if needs_onnx else [])}, key=list(FILES).index):
            status.update(FILES[name])
            if huggingface and name == "safetensors":
                run = _write_hub_folder(trained, out)
            else:
                run = _write(name, trained, backbone, out, pairs, inside)
            takes_pixels = inside and name in ("onnx", "fp16", "int8")
            row = _row(name, out, run, pairs, truth, size, flip, takes_pixels)
            if name in formats:
                rows.append(row)
    if "onnx" not in formats:
        (out / FILES["onnx"]).unlink(missing_ok=True)
    return rows


def _row(
    name: str,
    out: Path,
    run: Run,
    pairs: Pairs,
    truth: Original,
    size: int,
    flip: bool,
    inside: bool,
) -> dict[str, Any]:
    found = check(run, pairs, truth, size=size, flip=flip, inside=inside)
    cosine, allowed = ALLOWED.get(name, (0.9999, 0.0))
    fine = found["cosine"] >= cosine and abs(found["change"]) - found["width"] <= allowed
    mark = "measured" if name == "int8" else "the original" if fine else NOT_IT
    path = out / FILES[name]
    return {
        "format": name, "file": path.name, "bytes": path.stat().st_size,
        "fine": fine, "mark": mark, **found,
    }  # fmt: skip


def _write(
    name: str,
    trained: TrainedBackbone,
    backbone: torch.nn.Module,
    out: Path,
    pairs: Pairs,
    inside: bool,
) -> Run:
    """Write one file, and return how it is run."""
    path, size = out / FILES[name], trained.known.image_size
    if name == "safetensors":
        with atomic_write(path) as partial:
            partial.write_bytes(save(trained.state, metadata=_metadata(trained, inside=False)))
        again = TrainedBackbone(path, trained.known, read_backbone(path)).backbone()
        return lambda images: again(torch.from_numpy(images)).numpy()
    if name == "pt2":
        example = (torch.zeros(2, 3, size, size),)
        program = torch.export.export(
            backbone, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        with atomic_write(path) as partial, partial.open("wb") as file:
            torch.export.save(program, file)
        loaded = torch.export.load(path).module()
        return lambda images: loaded(torch.from_numpy(images)).numpy()
    from partialfc.commands._export import onnx_file

    if name == "onnx":
        onnx_file.write_onnx(
            backbone, path, image_size=size, inside=inside, metadata=_metadata(trained, inside)
        )
    elif name == "fp16":
        onnx_file.write_fp16(out / FILES["onnx"], path)
    else:
        images = calibration(pairs, size, inside, CALIBRATED_ON)
        onnx_file.write_int8(out / FILES["onnx"], path, images)
    run: Run = onnx_file.runner(path)
    return run


def _write_hub_folder(trained: TrainedBackbone, out: Path) -> Run:
    """Write the folder of the hub, and return how what is read from it is run."""
    write_hub_folder(out, trained.known, trained.state, _metadata(trained, inside=False))
    again = open_backbone(out).backbone()
    return lambda images: again(torch.from_numpy(images)).numpy()


def show(rows: list[dict[str, Any]], out: Path) -> int:
    """Print the files and what they cost; return 1 if one is not the original."""
    table = Table(box=None, header_style="bold")
    columns = ("file", "MiB", "smallest cosine", "accuracy", "original's", "change (99 %)", "")
    for column in columns:
        table.add_column(column, justify="left" if column == "file" else "right")
    for row in rows:
        table.add_row(
            row["file"],
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['cosine']:.6f}",
            f"{row['accuracy']:.4f}",
            f"{row['original']:.4f}",
            f"{row['change']:+.4f} ± {row['width']:.4f}",
            row["mark"],
        )
    Console(width=100, markup=False).print(table)
    print(f"{out / 'README.md'}: the model card")
    return int(not all(row["fine"] for row in rows))


def _check_set(asked: Path | None, trained: TrainedBackbone) -> Path:
    if asked is not None:
        return asked
    named = trained.config.verification.pairs if trained.config else ()
    if not named:
        raise ConfigError(
            "--check: give a .bin of pairs: an exported model is compared with the original on "
            "real images."
        )
    return named[0]


def _flip(trained: TrainedBackbone) -> bool:
    return trained.config.verification.flip if trained.config else True


def _metadata(trained: TrainedBackbone, inside: bool) -> dict[str, str]:
    known = trained.known
    return {
        "backbone": known.name,
        "embedding_dim": str(known.embedding_dim),
        "image_size": str(known.image_size),
        "pixels": "RGB, 0 to 255" if inside else "RGB, (pixel - 127.5) / 127.5",
        "step": str(trained.step),
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__)
    parser.add_argument("model", type=Path, help="run, checkpoint or file of weights")
    add_plugin_option(parser)
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("--check", type=Path, help="a .bin of pairs (the run's first)")
    parser.add_argument("--formats", help=f"({_ALL})")
    parser.add_argument(
        "--huggingface", action="store_true", help="OUT is a folder of the Hugging Face hub"
    )
    parser.add_argument(
        "--inside", action="store_true", help="ONNX takes pixels from 0 to 255 and normalises them"
    )
    parser.add_argument("--image-size", type=int, default=112, help="of a file's model (112)")
    parser.add_argument("--data-licence", default="unknown", help="for the model card (unknown)")
    return parser
