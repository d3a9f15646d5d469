"""Train several settings with several seeds on the same data order, and compare them in one report.

    python tools/compare.py configs/omniglot.toml --margins all --seeds 1,2 --out runs/margins
    python tools/compare.py configs/omniglot.toml --vary=head.sample_rate=1,0.3,0.1 --out runs/rates
    python tools/compare.py a.toml b.toml --seeds 1,2,3 --ranks 2 --out runs/ab run.epochs=2

A seed decides the order of the data, so every setting sees the same images with it. OUT gets
report.html (self-contained), results.csv and a folder for every run. A run that is there already is
not trained again; one that fails is left out, and the exit status is 1. Words of the form key=value
go to all runs.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from partialfc.config import ConfigError, config_hash, load
from partialfc.definitions.phrases import to_value
from partialfc.margins import MARGINS
from partialfc.model.build import margin_of
from partialfc.records.metrics import read_metrics
from tools._compare import page, table

ROOT = Path(__file__).resolve().parents[1]

_OVERRIDE = re.compile(r"[a-z_][a-z_.0-9]*=")


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the settings that are compared."""

    label: str
    config: Path
    overrides: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    options = _parser().parse_intermixed_args(arguments)
    configs = [Path(word) for word in options.words if not _OVERRIDE.match(word)]
    words = [word for word in options.words if _OVERRIDE.match(word)]
    try:
        seeds = seeds_of(options.seeds)
        variants = variants_of(configs, words, options.margins, options.vary)
        for variant in variants:  # a mistake is told before the first run
            config = load(variant.config, variant.overrides)
            config.check(options.ranks)
            margin_of(config)
            for seed in seeds:
                refuse_other_settings(variant, seed, options.out)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {variant.label: [] for variant in variants}
    failed: list[str] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(seeds) * len(variants))
        for seed in seeds:
            for variant in variants:
                progress.update(task, description=f"{variant.label}, seed {seed}")
                result = run(variant, seed, options.out, options.ranks)
                progress.advance(task)
                if result is None:
                    failed.append(f"{variant.label}, seed {seed}")
                    continue
                found[variant.label].append(result)
                page.write(options.out / "report.html", found, title=options.title)
                table.write_csv(options.out / "results.csv", found)
    show(found)
    print(f"{options.out / 'report.html'}: the report; {options.out / 'results.csv'}: its numbers")
    if failed:
        print(f"failed, and not in the report: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def seeds_of(words: str) -> list[int]:
    """Return the seeds.

    Raises:
        ValueError: If one is no number or comes twice.
    """
    seeds = words.split(",")
    if len(set(seeds)) < len(seeds) or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--seeds {words}: must be different numbers, separated by commas.")
    return [int(seed) for seed in seeds]


def folder_of(variant: Variant, seed: int, out: Path) -> Path:
    """Return the folder of a run."""
    return out / re.sub(r"[^\w.=-]+", "_", variant.label) / f"seed_{seed}"


def refuse_other_settings(variant: Variant, seed: int, out: Path) -> None:
    """Refuse a run of the same label that was made with other settings.

    Raises:
        ValueError: If there is one.
    """
    made = folder_of(variant, seed, out) / "config.toml"
    if made.exists():
        wanted = load(variant.config, [*variant.overrides, f"run.seed={seed}"])
        if config_hash(load(made)) != config_hash(wanted):
            raise ValueError(
                f"{made} is of a run with other settings than {variant.config} and the words have "
                "now. Choose another --out, or remove that folder."
            )


def variants_of(
    configs: list[Path], overrides: list[str], margins: str | None, vary: str | None
) -> list[Variant]:
    """Return what is compared: several files, or one file with margins or values of a setting.

    Raises:
        ValueError: If the request is not one of these, or a margin does not exist.
        ConfigError: If the base settings do not load.
    """
    if owned := [word for word in overrides if word.startswith(("run.seed=", "run.folder="))]:
        raise ValueError(f"{owned[0]}: seeds are --seeds, and folders are made inside --out.")
    if not configs or (len(configs) > 1 and (margins or vary)) or (margins and vary):
        raise ValueError(
            "give one settings file with --margins or --vary, or several settings files."
        )
    if margins:
        names = list(MARGINS) if margins == "all" else margins.split(",")
        if unknown := [name for name in names if name not in MARGINS]:
            raise ValueError(
                f"--margins {', '.join(unknown)}: must be of {', '.join(MARGINS)}, or all."
            )
        base = load(configs[0], overrides).head.margin
        others = [word for word in overrides if not word.startswith("head.margin")]
        return [
            Variant(name, configs[0], (*others, f"head.margin={_margin(name, base)}"))
            for name in dict.fromkeys(names)
        ]
    if vary:
        key, _, values = vary.partition("=")
        return [
            Variant(f"{key} = {value}", configs[0], (*overrides, f"{key}={value}"))
            for value in dict.fromkeys(_values(values))
        ]
    labels = [path.stem for path in configs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"the settings files need different names, got {', '.join(labels)}.")
    return [
        Variant(label, path, tuple(overrides)) for label, path in zip(labels, configs, strict=True)
    ]


def _values(words: str) -> list[str]:
    """Return what a setting is to be in turn: words between commas, or entries of a TOML list where
    any of them is a table or a list."""
    if not {"{", "["} & {*words}:
        return words.split(",")
    try:
        return [to_value(value) for value in tomllib.loads(f"values = [{words}]")["values"]]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--vary {words}: must be TOML, separated by commas: {error}.") from error


def _margin(name: str, base: Any) -> str:
    """Settings of a margin: those of the base that all margins have a use for, else its defaults.

    Another margin takes over ``scale``, ``label_smoothing`` and ``inter_class_filter`` where it has
    them and its own default is that of the base's margin.
    """
    values = base.model_dump(exclude_none=True)
    if name != base.name:
        other, same = MARGINS[name](), MARGINS[base.name]()
        values = {
            key: value
            for key, value in values.items()
            if key in ("scale", "label_smoothing", "inter_class_filter")
            and key in _fields(name)
            and getattr(other, key) == getattr(same, key)
        }
        values = {"name": name, **values}
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) + "}"


def _fields(name: str) -> set[str]:
    return {"name", *MARGINS[name].takes} if name in MARGINS else set()


def run(variant: Variant, seed: int, out: Path, ranks: int) -> dict[str, Any] | None:
    """Train and measure one variant with one seed, unless that is done; ``None`` if it fails."""
    folder = folder_of(variant, seed, out)
    if not (folder / "summary.json").exists():
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [
            *start,
            f"--nproc-per-node={ranks}",
            str(ROOT / "launch/train.py"),
            str(variant.config),
            *variant.overrides,
            f"run.folder={folder}",
            f"run.seed={seed}",
            "log.progress=false",
            "log.tensorboard=false",
        ]
        if not _done(command, folder.with_suffix(".log")):
            return None
    measured = folder / "measured.json"
    if not measured.exists():
        worker = str(ROOT / "tools/_compare/measure.py")
        command = [sys.executable, worker, str(folder), str(measured)]
        if not _done(command, folder.with_suffix(".log")):
            return None
    records = read_metrics(folder / "metrics.jsonl")
    return {
        **json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        **json.loads(measured.read_text(encoding="utf-8")),
        "seed": seed,
        "losses": [(record["step"], record["loss"]) for record in records if "loss" in record],
    }


def _done(command: list[str], log: Path) -> bool:
    """Run a command with its output in a file; say where that is if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        print(f"exit code {done.returncode}, see {log}:\n{last}", file=sys.stderr)
    return done.returncode == 0


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print means and spreads."""
    shown = Table("", *(column.title for column in table.COLUMNS))
    for label, results in found.items():
        cells = (table.cell(column, results) for column in table.COLUMNS)
        shown.add_row(label, *cells)
    Console(width=160).print(shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG or key=value")
    parser.add_argument("--margins", help="names separated by commas, or all")
    parser.add_argument("--vary", metavar="KEY=V1,V2", help="values of one setting")
    parser.add_argument("--seeds", default="1,2", help="separated by commas (1,2)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and report")
    parser.add_argument("--title", default="Comparison", help="of the report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
