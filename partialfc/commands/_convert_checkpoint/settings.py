"""A configs/*.py of arcface_torch, read without running it, as our settings.

Only ``config.NAME = VALUE`` is understood, where VALUE is made of literals, ``config.OTHER`` and
arithmetic. Anything else in the file is an error with its line.
"""

import ast
import itertools
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from partialfc.config import ConfigError
from partialfc.writing import read_text

Settings = dict[str, Any]

DEFAULTS: Settings = {
    "margin_list": (1.0, 0.5, 0.0),
    "network": "r50",
    "embedding_size": 512,
    "sample_rate": 1.0,
    "interclass_filtering_threshold": 0,
    "fp16": False,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "verbose": 2000,
    "frequent": 10,
    "gradient_acc": 1,
    "seed": 2048,
    "num_workers": 2,
    "warmup_epoch": 0,
    "val_targets": [],
}
"""Those of arcface_torch's configs/base.py, which every one of its runs begins with."""


def _vit(name: str, masked: float, drop_path: float) -> Settings:
    return {"name": name, "options": {"masked": masked, "drop_path": drop_path}}


NETWORKS: dict[str, Settings] = {
    **{f"r{depth}": {"name": f"iresnet{depth}"} for depth in (18, 34, 50, 100, 200, 2060)},
    "mbf": {"name": "mobilefacenet"},
    "mbf_large": {"name": "mobilefacenet_large"},
    "vit_t": _vit("vit_t", 0.1, 0.1),
    "vit_t_dp005_mask0": _vit("vit_t", 0.0, 0.05),
    "vit_s": _vit("vit_s", 0.1, 0.1),
    "vit_s_dp005_mask_0": _vit("vit_s", 0.0, 0.05),
    "vit_b": _vit("vit_b", 0.1, 0.1),
    "vit_b_dp005_mask_005": _vit("vit_b", 0.1, 0.05),
    "vit_l_dp005_mask_005": _vit("vit_l", 0.1, 0.05),
    "vit_h": _vit("vit_h", 0.0, 0.1),
}
"""Those of arcface_torch as ``[backbone]``. Its ViTs mask a tenth of the patches wherever
mask_ratio is not 0, whatever it is."""

NO_COUNTERPART = {
    "resume": "a run always goes on from its newest checkpoint; run.resume = false refuses to",
    "save_all_states": "a checkpoint always holds all states",
    "num_classes": "the pack says",
    "num_image": "the pack says; here it counts warm-up steps only",
    "dali": "data.loader is auto: DALI where it is installed",
    "momentum": "arcface_torch ignores it and uses 0.9, and so does this file",
}
_SILENT = ("wandb", "using_wandb", "suffix_run_name", "save_artifacts", "notes")

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def parse(path: Path) -> Settings:
    """Return what a settings file of arcface_torch assigns; nothing in it is run.

    Raises:
        ConfigError: If it cannot be read, or does anything but assign plain values.
    """
    try:
        return _assigned(path)
    except (RecursionError, MemoryError):  # the latter is the parser's word for the former
        raise ConfigError(f"{path}: it is nested too deeply to be settings.") from None


def comments(path: Path) -> list[str]:
    """Return the comments at the top of a settings file, as they are."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    top = itertools.takewhile(lambda line: not line or line.startswith("#"), lines)
    return ["".join(c for c in line if c.isprintable()) for line in top if line]


def _assigned(path: Path) -> Settings:
    try:
        tree = ast.parse(read_text(path), str(path))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    found: Settings = {}
    for statement in tree.body:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                continue
            case ast.Assign(targets=[ast.Name(id="config")], value=ast.Call()):
                continue  # config = edict()
            case ast.Assign(
                targets=[ast.Attribute(value=ast.Name(id="config"), attr=name)], value=value
            ):
                found[name] = _value(value, found, path)
            case _:
                raise _refusal(path, statement, "is not config.NAME = VALUE")
    if not found:
        raise ConfigError(f"{path}: it assigns no config.NAME; give a configs/*.py.")
    return found


def translate(theirs: Settings, ranks: int, path: Path) -> tuple[Settings, list[str]]:
    """Return our settings as nested tables, and sentences on what has no counterpart.

    Args:
        theirs: From :func:`parse`.
        ranks: GPUs that they trained on: their batch is per GPU, ours is over all.
        path: Where they come from, for errors.

    Raises:
        ConfigError: If a value cannot be had here; the message says what can.
    """
    full, notes = {**DEFAULTS, **theirs}, []
    for name, value in theirs.items():
        if name in NO_COUNTERPART:
            notes.append(f"{name} = {value!r}: {NO_COUNTERPART[name]}.")
        elif name not in DEFAULTS and name not in _USED and not name.startswith(_SILENT):
            raise ConfigError(
                f"{path}: config.{name} = {value!r}: not a setting of arcface_torch that is known "
                f"here. Remove it if it does nothing. Known: {', '.join(sorted(_KNOWN))}."
            )
    try:
        return _translated(full, ranks, notes), notes
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _translated(full: Settings, ranks: int, notes: list[str]) -> Settings:
    network, packs = str(full["network"]), _packs(full.get("rec", ""))
    if network not in NETWORKS:
        raise ValueError(
            f'config.network = "{network}": there is no such backbone here. Known: '
            f"{', '.join(NETWORKS)}."
        )
    if full.get("dali_aug"):
        raise ValueError("config.dali_aug = True: that augmentation does not exist here.")
    accumulation = int(full["gradient_acc"])
    per_step = int(full["batch_size"]) * ranks
    warmup = max(0, full["warmup_epoch"])
    if warmup and "num_image" not in full:
        raise ValueError("config.warmup_epoch needs config.num_image, which is not there.")
    steps = round(full.get("num_image", 0) // per_step * warmup / accumulation)
    sgd = full["optimizer"] == "sgd"
    if not sgd and full["optimizer"] != "adamw":
        raise ValueError(f"config.optimizer = {full['optimizer']!r}: must be sgd or adamw.")
    if accumulation > 1:
        notes.append(
            f"gradient_acc = {accumulation}: some versions of arcface_torch add the gradients "
            "without dividing them; if yours does, multiply optimizer.lr by it."
        )
    if sgd and full["sample_rate"] < 1:
        notes.append(
            "head.optimizer.unsampled = move, the default: every center moves by its momentum at "
            "every step, as in version 2 of their Partial FC."
        )
    notes.append(
        "schedule.name = linear: theirs since April 2023; the published logs are older and have "
        "schedule={name='polynomial', power=2.0}."
    )
    common = {"name": full["optimizer"], "weight_decay": float(full["weight_decay"])}
    moving = {"unsampled": "move"} if sgd and full["sample_rate"] < 1 else {}
    return {
        "run": {
            **({"folder": str(full["output"])} if full.get("output") else {}),
            "seed": full["seed"],
            **({"epochs": float(full["num_epoch"])} if "num_epoch" in full else {}),
        },
        "data": {
            "train": packs[0] if len(packs) == 1 else packs,
            "global_batch": per_step * accumulation,
            "threads": max(1, int(full["num_workers"])),
        },
        "backbone": {**NETWORKS[network], "embedding_dim": full["embedding_size"]},
        "precision": {"compute": "fp16" if full["fp16"] else "fp32"},
        "head": {
            "sample_rate": float(full["sample_rate"]),
            "compute": "fp32",
            "margin": _margin(full, notes),
            "optimizer": {**common, **moving},
        },
        "optimizer": {**common, "lr": float(full["lr"]), "accumulation": accumulation},
        "schedule": {"name": "linear", "warmup_steps": steps},
        "verification": {
            "pairs": [f"{_folder(packs[0])}/{name}.bin" for name in full["val_targets"]],
            **({"every_steps": full["verbose"]} if full["val_targets"] else {}),
        },
        "log": {"every_steps": full["frequent"]},
    }


def _packs(rec: Any) -> list[str]:
    """What ``config.rec`` names: folders with train.rec, packs, or folders of images."""
    named = [rec] if isinstance(rec, str) else rec
    if not isinstance(named, list) or not named or not all(isinstance(n, str) for n in named):
        raise ValueError(f"config.rec = {rec!r}: must be a folder, or a list of folders.")
    return [_pack(name.rstrip("/") or name) for name in named]


def _pack(name: str) -> str:
    if name in ("", "synthetic"):
        raise ValueError(
            f'config.rec = "{name}": must be a folder with train.rec and train.idx, a .rec or a '
            "folder of images; tools/bench/head.py measures speed without data."
        )
    path = Path(name)
    # Theirs takes a folder without train.rec for one of images, a subfolder for each identity.
    of_images = path.is_dir() and not (path / "train.rec").exists()
    return name if path.suffix == ".rec" or of_images else f"{name}/train.rec"


def _folder(pack: str) -> str:
    return str(Path(pack).parent) if pack.endswith(".rec") else pack


def _margin(full: Settings, notes: list[str]) -> Settings:
    if "loss" in full:  # before margin_list
        named = {"arcface": (1.0, 0.5, 0.0), "cosface": (1.0, 0.0, 0.4)}
        if full["loss"] not in named:
            raise ValueError(f"config.loss = {full['loss']!r}: must be arcface or cosface.")
        full = {**full, "margin_list": named[full["loss"]]}
    m1, m2, m3 = (float(value) for value in full["margin_list"])
    if m3 > 0 and (m1 != 1 or m2 != 0):
        notes.append(
            f"margin_list = ({m1:g}, {m2:g}, {m3:g}): arcface_torch ignores the first two where "
            "the third is above 0, and so does this file. For all three: head.margin = {name = "
            f'"combined", multiplicative = {m1:g}, angular = {m2:g}, additive = {m3:g}}}.'
        )
    elif m1 != 1:
        raise ValueError(
            f"config.margin_list = ({m1:g}, {m2:g}, {m3:g}): arcface_torch raises an error where "
            'the first is not 1; set head.margin.name = "combined" by hand.'
        )
    margin: Settings = {"scale": 64.0}
    margin |= {"name": "cosface", "additive": m3} if m3 > 0 else {"name": "arcface", "angular": m2}
    if full["interclass_filtering_threshold"]:
        margin["inter_class_filter"] = float(full["interclass_filtering_threshold"])
    return margin


_USED = {"rec", "num_epoch", "output", "loss", "dali_aug"}
_KNOWN = {*DEFAULTS, *_USED, *NO_COUNTERPART}


def _value(node: ast.expr, found: Mapping[str, Any], path: Path) -> Any:
    """The value of an expression of literals, earlier settings and arithmetic."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return [_value(item, found, path) for item in items]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            number = _value(inner, found, path)
            if isinstance(number, int | float):
                return -number
        case ast.Attribute(value=ast.Name(id="config"), attr=name) if name in found:
            return found[name]
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            pair = _value(left, found, path), _value(right, found, path)
            if all(isinstance(value, int | float) for value in pair):
                try:
                    return _OPERATORS[type(sign)](*pair)
                except (ArithmeticError, ValueError) as error:
                    raise _refusal(path, node, str(error)) from error
    raise _refusal(path, node, "is not a plain value")


def _refusal(path: Path, node: ast.stmt | ast.expr, problem: str) -> ConfigError:
    text = ast.unparse(node).split("\n")[0][:80]
    return ConfigError(
        f"{path}, line {node.lineno}: {text!r} {problem}. The file is read, not run: write the "
        "value itself, e.g. config.warmup_epoch = 2."
    )
