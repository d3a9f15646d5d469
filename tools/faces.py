"""Real faces from photos to figures, with copies of LFW and CFP that you have.

    make faces LFW=folder CFP=folder

Aligns the photos, splits LFW by its own list of people, trains on those of peopleDevTrain.txt with
configs/faces.toml and two processes, in bf16 where the CPU multiplies in it, and measures people
that were not trained on: LFW's pairsDevTest.txt, its ten folds of pairs.txt (nothing may be chosen
by these, and some of their people are in peopleDevTrain), and CFP's ten folds of frontal pairs and
of frontal and profile ones.
Pixels, whitened PCA and the network before training are measured beside it. Everything lies in
packs/faces and runs/faces; what is aligned is not aligned again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from partialfc.config import load
from partialfc.cores import usable_cores
from partialfc.data.sets.people import read_people
from partialfc.writing import write_json
from tools._lfw.baselines import baselines

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/faces.toml"
PACKS, RANKS = Path("packs/faces"), 2
PEOPLE = "peopleDevTrain.txt"
LISTS = {"dev_test": "pairsDevTest.txt", "ten_folds": "pairs.txt"}
"""LFW's lists of pairs by the name of their ``.bin``."""


def main(arguments: list[str] | None = None) -> int:
    """Do all of it; return the exit code of what failed, or 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lfw", type=Path, help="folder with LFW's lists and its photos below")
    parser.add_argument("--cfp", type=Path, help="folder with CFP's Data and Protocol")
    parser.add_argument("override", nargs="*", help="key.sub=value, on top of configs/faces.toml")
    options = parser.parse_intermixed_args(arguments)
    lfw, cfp = options.lfw.resolve(), options.cfp.resolve() if options.cfp else None
    os.chdir(ROOT)
    started = time.monotonic()
    override = [*_formats(), *options.override]
    config = load(Path(CONFIG), override)
    run, results = Path(config.run.folder), Path(config.run.folder) / "results"
    try:
        sets = prepare(lfw, cfp)
        shutil.rmtree(run, ignore_errors=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={RANKS}", "-m", "partialfc", "train"]
        _shell(*torchrun, CONFIG, *override)
        _partialfc("evaluate", run, *sets, "--flip", "--out", results)
    except subprocess.CalledProcessError as error:
        return error.returncode
    measured = json.loads((results / "results.json").read_text(encoding="utf-8"))["sets"]
    rows = baselines(
        PACKS / "train.rec",
        sets,
        backbone=config.backbone.name,
        embedding_dim=config.backbone.embedding_dim,
        size=config.data.image_size,
        seed=config.run.seed,
    )
    rows[f"partialfc, {config.head.margin.name}"] = {
        Path(name).stem: one["numbers"]["accuracy"] for name, one in measured.items()
    }
    seconds = time.monotonic() - started
    write_json(run / "faces.json", {"accuracy": rows, "seed": config.run.seed, "seconds": seconds})
    _show(rows, [path.stem for path in sets])
    print(f"{seconds:.0f} s; {run / 'faces.json'}, {run / 'report.html'}")
    return 0


def prepare(lfw: Path, cfp: Path | None) -> list[Path]:
    """Make the training pack and the sets of pairs; return the sets.

    Raises:
        ValueError: If a folder has not what it must have.
        subprocess.CalledProcessError: If a command fails.
    """
    for name in (PEOPLE, *LISTS.values()):
        if not (lfw / name).is_file():
            raise ValueError(f"{lfw / name} is not there: it must be LFW's folder, with its lists.")
    PACKS.mkdir(parents=True, exist_ok=True)
    for name in ("split", "train.rec", "train.idx", "train.identities.json"):
        path = PACKS / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # The person whom a photo of LFW is of is in its middle.
    _partialfc("align", photos_of(lfw), PACKS / "lfw", "--face", "central")
    split = PACKS / "split"
    _partialfc("split", PACKS / "lfw", split, "--people", lfw / PEOPLE, "--validation", "0")
    _partialfc("pack", split / "train", PACKS / "train.rec")
    sets = []
    for name, file in LISTS.items():
        sets.append(PACKS / f"{name}.bin")
        _partialfc("convert", "bin", lfw / file, sets[-1], "--images", PACKS / "lfw")
    if cfp is not None:
        images = cfp / "Data" / "Images"
        parts = [images]
        if not (images / "001").is_dir():  # copies that have the people in train/ and test/
            parts = sorted(folder for folder in images.iterdir() if folder.is_dir())
        for part in parts:
            rejects = PACKS / f"cfp.{part.name}.rejects.csv"
            _partialfc("align", part, PACKS / "cfp", "--rejects", rejects)
        for name in ("FF", "FP"):
            sets.append(PACKS / f"cfp_{name.lower()}.bin")
            folds = cfp / "Protocol" / "Split" / name
            _partialfc("convert", "bin", folds, sets[-1], "--images", PACKS / "cfp")
    return sets


def photos_of(lfw: Path) -> Path:
    """Return the folder with a folder for each person: LFW's own, or one in it.

    Raises:
        ValueError: If there is none.
    """
    person = read_people(lfw / PEOPLE)[0]
    for folder in (lfw, *sorted(path for path in lfw.iterdir() if path.is_dir())):
        if (folder / person).is_dir():
            return folder
    raise ValueError(f"{lfw}: no folder in it has a folder {person} of photos.")


def _formats() -> list[str]:
    """bf16 where the CPU multiplies in it: twice the images a second. Others would imitate it."""
    can: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return ["precision.compute=bf16"] if can.get("avx512_bf16") or can.get("amx_bf16") else []


def _partialfc(*words: object) -> None:
    _shell(sys.executable, "-m", "partialfc", *words)


def _shell(*words: object) -> None:
    """Run a command and show it; left out, torchrun would set the threads to 1 with a warning."""
    command = [str(word) for word in words]
    print(f"\n$ {shlex.join(['python', *command[1:]])}\n", flush=True)
    threads = str(max(1, usable_cores() // RANKS))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    subprocess.run(command, env=environment, check=True)


def _show(rows: dict[str, dict[str, float]], sets: list[str]) -> None:
    table = Table("ten-fold accuracy", *sets, box=None, header_style="bold")
    for name, accuracy in rows.items():
        table.add_row(name, *(f"{accuracy[one]:.4f}" for one in sets))
    Console(soft_wrap=True, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
