"""In from arcface_torch and out to it: checkpoints of any number of ranks, settings, weights.

    partialfc convert-checkpoint in work_dirs/wf42m runs/wf42m --config configs/wf42m.py
    torchrun --nproc-per-node=4 -m partialfc train runs/wf42m/config.toml    # goes on from there
    partialfc convert-checkpoint out runs/wf42m model.pt            # their keys again
    partialfc convert-checkpoint settings configs/wf42m.py --ranks 32

Files are read as data and never run. "in" takes the folder with checkpoint_gpu_*.pt, or model.pt or
backbone.pth with softmax_fc_gpu_*.pt or rank_*_softmax_weight(_mom).pt, or a backbone alone, whose
centers then start anew; statistics of BatchNorm are those of their rank 0, as in their model.pt.
Started by torchrun, every rank reads the part of the centers that it owns.
"""

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from partialfc.checkpoint import CheckpointError, foreign, recognition
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.commands._convert_checkpoint import layouts, settings
from partialfc.commands._convert_checkpoint.fill import fill
from partialfc.config import Config, ConfigError, load, to_toml
from partialfc.config.file import with_override
from partialfc.definitions.phrases import to_value
from partialfc.model.build import Model, build
from partialfc.records.console import from_here
from partialfc.runtime.process import Runtime, running
from partialfc.training.images import numberings, open_images
from partialfc.training.must_match import must_match
from partialfc.writing import atomic_write, write_text

_IMAGE_SIZE = "data.image_size="
_OVERRIDE = re.compile(r"[a-z_][a-z_.0-9]*=")


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    options, words = parser.parse_known_args(arguments)
    unknown = [word for word in words if options.what == "out" or not _OVERRIDE.match(word)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = words
    if options.what == "in":
        return bring_in(options)
    if options.what == "out":
        return take_out(options.run, options.model)
    theirs = settings.parse(options.config)
    text, _ = toml_of(theirs, options.ranks, options.config)
    load_text(text, options.overrides, options.config)
    text, notes = toml_of(theirs, options.ranks, options.config, options.overrides)
    print(*settings.comments(options.config), text, *(f"# {note}" for note in notes), sep="\n")
    return 0


def bring_in(options: argparse.Namespace) -> int:
    """Write a run's folder that training goes on from. Collective."""
    layout = layouts.find(options.source)
    config, notes = _settings(options, layout)
    known = recognition.recognise(layout.backbone, layout.source, image_size=config.data.image_size)
    ours = config.backbone
    if (known.name, known.embedding_dim) != (ours.name, ours.embedding_dim):
        raise ConfigError(
            f"{layout.source}: holds {known.name} with embeddings of {known.embedding_dim}, and "
            f'the settings have backbone.name = "{ours.name}" and backbone.embedding_dim = '
            f"{ours.embedding_dim}."
        )
    if ours.lora.rank:
        raise ConfigError(
            f"backbone.lora.rank = {ours.lora.rank}: what is brought in has no adapters. Remove "
            "[backbone.lora], and begin a run with adapters with run.start_from."
        )
    if config.stages:
        raise ConfigError(
            "[[stages]]: what is brought in is of no stage. Remove them, and add them to the "
            "config.toml in the run's folder: its checkpoint is then of the first."
        )
    folder = config.run.folder / "checkpoints"
    if checkpoint.exist(folder):
        raise ConfigError(f"{folder}: there are checkpoints already. Choose another folder.")
    step = (layout.step or 0) if options.step is None else options.step
    with running(config) as runtime:
        try:
            dataset = open_images(config)
        except ConfigError as error:
            raise ConfigError(
                f"{str(error).rstrip('.')}. A checkpoint belongs to the pack that it goes on with."
            ) from error
        model = build(config, runtime, numberings(config, dataset))
        fill(model, layout, step)
        path = checkpoint.save(folder, step, model, must_match(config, dataset), runtime, keep=1)
        _finish(config, layout, model, path, notes, runtime)
    return 0


def _finish(
    config: Config,
    layout: layouts.Layout,
    model: Model,
    path: Path,
    notes: list[str],
    runtime: Runtime,
) -> None:
    if not runtime.leads:
        return
    write_text(config.run.folder / "config.toml", to_toml(config))
    problem = checkpoint.verify(path)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    step, ranks = path.name.removeprefix("step_"), len(layout.shards)
    table = Table(show_header=False)
    rows = {
        "found": layout.kind + (f" of {ranks} ranks" if ranks else ""),
        "backbone": f"{config.backbone.name}, every tensor as it was, in fp32",
        "its optimizer": "as it was" if layout.backbone_states else "at zero: no state was found",
        "centers": f"{model.head.sharding.num_identities:,}"
        + (", every row as it was" if ranks else ", new: no file of them was found"),
        "step": f"{int(step):,}" + ("" if layout.step is not None else " (the files do not say)"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    print(from_here(path))
    Console(markup=False).print(table)
    for note in notes:
        print(f"note: {note}")
    settings_file = from_here(config.run.folder) / "config.toml"
    print(f"torchrun --standalone --nproc-per-node=N -m partialfc train {settings_file}")


def take_out(run: Path, model: Path) -> int:
    """Write the backbone of a run as arcface_torch's model.pt."""
    if model.suffix == ".safetensors":
        raise ConfigError(
            f"{model}: arcface_torch reads a .pt; partialfc export writes safetensors, with "
            "--formats safetensors."
        )
    trained = open_backbone(run)
    trained.require_images()
    with atomic_write(model) as partial:
        torch.save(trained.state, partial)
        back = foreign.read_backbone(partial)
        if any(not torch.equal(back[name], value) for name, value in trained.state.items()):
            raise CheckpointError(f"{model}: does not read back as it was written.")
    at = "" if trained.step is None else f" at step {trained.step:,}"
    print(f"{model}: {trained.known.name}{at}, {len(trained.state)} tensors, arcface_torch's keys")
    return 0


def toml_of(
    theirs: settings.Settings, ranks: int, path: Path, overrides: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Return our settings as TOML, and sentences on what has no counterpart."""
    ours, notes = settings.translate(theirs, ranks, path)
    for override in overrides:
        ours = with_override(ours, override)
    lines = []
    for section, values in ours.items():
        lines += [f"[{section}]", *(f"{k} = {to_value(v)}" for k, v in values.items()), ""]
    return "\n".join(lines), notes


def load_text(text: str, overrides: list[str], path: Path) -> Config:
    """Return settings from TOML that is in no file; problems name the file it was made from."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{path.stem}.toml"
        file.write_text(text, encoding="utf-8")
        try:
            return load(file, overrides)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(file), str(path))) from None


def _settings(options: argparse.Namespace, layout: layouts.Layout) -> tuple[Config, list[str]]:
    """The settings of the run that goes on, in the folder that was asked for."""
    overrides = [*options.overrides, f"run.folder={to_value(options.out)}"]
    if options.settings is not None:
        return load(options.settings, overrides), []
    if options.config is None:
        sizes = [word.partition("=")[2] for word in overrides if word.startswith(_IMAGE_SIZE)]
        size = int(sizes[-1]) if sizes and sizes[-1].isdecimal() else 112
        known = recognition.recognise(layout.backbone, layout.source, image_size=size)
        text = f'[backbone]\nname = "{known.name}"\nembedding_dim = {known.embedding_dim}\n'
        return load_text(text, overrides, layout.source), []
    ranks = options.ranks or len(layout.shards)
    if not ranks:
        raise ConfigError(
            f"{options.source}: no class centers, so nothing says how many GPUs the batch was for; "
            "give --ranks."
        )
    theirs = settings.parse(options.config)
    text, notes = toml_of(theirs, ranks, options.config)
    if layout.sampled_only:  # version 1 never moved the others
        text = text.replace('unsampled = "move"', 'unsampled = "stay"')
        notes = [note for note in notes if "unsampled" not in note]
    return load_text(text, overrides, options.config), notes


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("convert-checkpoint", __doc__)
    commands: Any = parser.add_subparsers(dest="what", required=True, metavar="in|out|settings")
    reading = commands.add_parser("in", help="a checkpoint of arcface_torch -> a run's folder")
    reading.add_argument("source", type=Path, help="folder, or file of a backbone")
    reading.add_argument("out", type=Path, help="folder of the run that goes on")
    of = reading.add_mutually_exclusive_group()
    of.add_argument("--config", type=Path, help="their configs/*.py")
    of.add_argument("--settings", type=Path, help="a TOML file of ours instead")
    reading.add_argument("--step", type=_step, help="steps taken, where the files do not say")
    writing = commands.add_parser("out", help="a run -> model.pt")
    writing.add_argument("run", type=Path, help="folder of the run, or of one checkpoint")
    add_plugin_option(writing)
    writing.add_argument("model", type=Path, help="file to write")
    words = commands.add_parser("settings", help="their configs/*.py -> TOML on the screen")
    words.add_argument("config", type=Path, help="their configs/*.py")
    for command in (reading, words):
        command.add_argument(
            "--ranks",
            type=int,
            required=command is words,
            help="GPUs that they trained on (their batch is per GPU)",
        )
        command.epilog = "Words of the form key.sub=value are settings of ours, on top of theirs."
    return parser


def _step(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word}: must be an integer >= 0")
    return int(word)
