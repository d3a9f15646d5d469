"""The model card: what a file of weights is, in words, from what its run left behind."""

import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from partialfc.backbones import BACKBONES
from partialfc.checkpoint import hub_folder
from partialfc.checkpoint.recognition import Known
from partialfc.checkpoint.trained_backbone import TrainedBackbone
from partialfc.config import to_toml
from partialfc.writing import write_text

Row = dict[str, Any]

_ONNX = ("onnx", "fp16", "int8")
_FROM_ONNX = (
    "import numpy as np, onnxruntime\nfrom PIL import Image",
    'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])',
    'session.run(None, {{"input.1": {batch}}})[0]',
)
_FROM_HUB = (
    "import numpy as np, torch\nfrom PIL import Image\n"
    "from partialfc.checkpoint.huggingface import PretrainedBackbone",
    'model = PretrainedBackbone.from_pretrained(".")  # or the name of its repository',
    "model(torch.from_numpy({batch})).detach().numpy()",
)
"""Imports, what is opened, and how a batch is run, in the lines of the card."""
_LIMITS = """\
* It compares aligned faces of the size above and does nothing else: no detection, no liveness, no
  age or gender. Align by five landmarks (`partialfc embed --landmarks`, insightface).
* A threshold belongs to a data set and a purpose. Measure false accepts on images like those it
  will see (`partialfc evaluate`), for every group of people that it will be used on; error rates of
  face recognition differ between groups, and nothing here has measured that for this model.
* Not for decisions about people without a person who checks them, nor where biometric data may not
  be processed. Embeddings are biometric data.
"""


def write_card(
    path: Path,
    trained: TrainedBackbone,
    rows: list[Row],
    *,
    inside: bool,
    licence: str,
    checked_on: str,
    flip: bool,
    front: str = "",
) -> None:
    """Write the card in markdown, the whole file or none.

    Args:
        path: Replaced if it exists.
        trained: Whose weights they are.
        rows: Of :func:`partialfc.commands._export.check.check`, one for each file.
        inside: Whether the ONNX files normalise pixels themselves.
        licence: Of the training data, or "unknown".
        checked_on: The set that the files were compared on.
        flip: Whether the embedding of the mirrored image was added there.
        front: What stands before the card, as :func:`front_matter` makes it.
    """
    known = trained.known
    parts = [
        f"# {trained.name}",
        f"{known.name} for face recognition: an aligned RGB image of {known.image_size} x "
        f"{known.image_size} pixels to an embedding of {known.embedding_dim} numbers. Two faces "
        "are compared by the cosine of their embeddings.",
        "## Files",
        _files(rows, checked_on),
        *([_onnx_input(known, inside)] if _has_onnx(rows) else []),
        "## Use",
        *_use(known, rows, inside, flip, checked_on, hub=bool(front)),
        "## Training",
        *_training(trained, licence),
        "## Numbers",
        *_numbers(trained),
        "## Intended use and limits",
        _LIMITS,
        f"Written {date.today().isoformat()} by partialfc's partialfc export.",
    ]
    write_text(path, front + "\n\n".join(part.strip() for part in parts) + "\n")


def front_matter(trained: TrainedBackbone, rows: list[Row]) -> str:
    """Return the hub's metadata of a model, YAML between two lines of dashes.

    What the run measured at its end is listed as its results. A licence and the hub's names of data
    sets are the owner's to add.

    Args:
        trained: Whose weights they are.
        rows: As in :func:`write_card`.
    """
    metadata: Row = {
        "library_name": hub_folder.LIBRARY,
        "pipeline_tag": hub_folder.TASK,
        "tags": [*hub_folder.TAGS, trained.known.name, *(["onnx"] if _has_onnx(rows) else [])],
    }
    sets = _summary(trained)[0].get("verification", {}).get("sets", {})
    if sets:
        metadata["metrics"] = ["accuracy"]
        results = [_result(name, numbers["accuracy"]) for name, numbers in sets.items()]
        metadata["model-index"] = [{"name": trained.name, "results": results}]
    # JSON is YAML, and no name can break out of it.
    lines = [f"{name}: {json.dumps(value)}" for name, value in metadata.items()]
    return "\n".join(["---", *lines, "---", "", ""])


def _onnx_input(known: Known, inside: bool) -> str:
    pixels = "0 to 255" if inside else "(pixel - 127.5) / 127.5"
    return (
        f"ONNX input `input.1` [batch, 3, {known.image_size}, {known.image_size}], RGB, "
        f"{pixels}; output `embedding` [batch, {known.embedding_dim}], not normalised. "
        "insightface's ArcFaceONNX takes the files as they are."
    )


def _has_onnx(rows: list[Row]) -> bool:
    return any(row["format"] in _ONNX for row in rows)


def _result(name: str, accuracy: float) -> Row:
    return {
        "task": {"type": hub_folder.TASK, "name": "face verification"},
        "dataset": {"type": name, "name": name},
        "metrics": [{"type": "accuracy", "name": "ten-fold accuracy", "value": accuracy}],
    }


def _files(rows: list[Row], checked_on: str) -> str:
    lines = [
        f"| file | MiB | smallest cosine to the original | accuracy on {checked_on} | of the "
        "original | change, 99 % interval | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{row['bytes'] / 2**20:.1f}"]
        for name, form in (("cosine", ".6f"), ("accuracy", ".4f"), ("original", ".4f")):
            numbers.append(f"{row[name]:{form}}" if row.get(name) is not None else "–")
        numbers.append(f"{row['change']:+.4f} ± {row['width']:.4f}")
        mark = row["mark"] if row["fine"] else f"**{row['mark']}**"
        lines.append(f"| {row['file']} | {' | '.join(numbers)} | {mark} |")
    rule = (
        "The accuracy is ten-fold. The change counts pairs that the original and the file answer "
        "differently at the original's threshold; a file is the original if its smallest cosine is "
        "at least 0.9999 and 0 lies in the interval, in fp16 if it is 0.999 and a change of at "
        "most 0.001 does. INT8 is measured only."
    )
    return "\n".join(lines) + f"\n\n{rule}"


def _use(
    known: Known, rows: list[Row], inside: bool, flip: bool, checked_on: str, hub: bool
) -> Iterator[str]:
    """The cosine above which two faces are one person's, and code that computes it."""
    row = next((row for row in rows if row["format"] in _ONNX), rows[0])
    thresholds = {far: t for far, t in row["threshold_at_far"].items() if not math.isnan(t)}
    lines = "\n".join(f"| {far:g} | {cosine:.4f} |" for far, cosine in thresholds.items())
    yield (
        f"Two faces are taken for one person's if their cosine exceeds a threshold. Those of "
        f"{row['file']} on {checked_on}, each the lowest whose part of wrongly accepted pairs is "
        f"at most the false accept rate:\n\n| FAR | cosine |\n|---|---|\n{lines}"
        if thresholds
        else f"{checked_on} has too few pairs of different people for a threshold at a FAR."
    )
    is_onnx, told = row["format"] in _ONNX, known.name in BACKBONES
    if not (told or hub):
        yield (
            f"The safetensors do not say that they are {known.name}: give `partialfc embed` the "
            "folder of the run, or what `partialfc export --huggingface` writes."
        )
    if not (is_onnx or hub):
        embeds = "`partialfc embed` takes the safetensors, " if told else ""
        yield f"{embeds}`torch.export.load` takes the .pt2."
        return
    x, size = "pixels.transpose(2, 0, 1)", known.image_size
    x = x if inside and is_onnx else f"({x} - 127.5) / 127.5"
    mirrored = "  # and mirrored, as measured" if flip else ""
    batch = "np.stack([x, x[:, :, ::-1]])" if flip else "x[None]"
    imports, opened, run = _FROM_ONNX if is_onnx else _FROM_HUB
    yield f"""```python
{imports}

{opened.format(file=row["file"])}

def embed(path):  # of an aligned face
    pixels = np.asarray(Image.open(path).convert("RGB").resize(({size}, {size})), np.float32)
    x = {x}
    row = {run.format(batch=batch)}.sum(0){mirrored}
    return row / np.linalg.norm(row)

print(embed("one.jpg") @ embed("other.jpg"))  # the cosine
```"""


def _training(trained: TrainedBackbone, licence: str) -> list[str]:
    if trained.config is None:
        return [f"Unknown: only the weights were given. Licence of the training data: {licence}."]
    config = trained.config
    names = ", ".join(path.name for path in config.data.sources)
    decay = config.backbone.ema
    averaged = f"; the moving average of the weights, of decay {decay:g}" if decay else ""
    if config.optimizer.name == "schedule_free":
        averaged = "; the mean of the weights that schedule-free AdamW keeps"
    return [
        f"{names}; step {trained.step:,} with {config.data.global_batch:,} images each{averaged}. "
        "Licence of "
        f"the training data: **{licence}**.",
        "<details><summary>All settings</summary>\n\n"
        f"```toml\n{_without_paths(to_toml(config))}```\n\n</details>",
    ]


def _without_paths(toml: str) -> str:
    """Settings without the folders of the machine they were used on."""
    kept = [line for line in toml.splitlines() if '"/' not in line]
    return "\n".join(kept) + "\n"


def _numbers(trained: TrainedBackbone) -> list[str]:
    """What the run measured at its end."""
    found, missing = _summary(trained)
    if missing:
        return [missing]
    lines = ["| set | | |", "|---|---|---|"]
    for name, numbers in found.get("verification", {}).get("sets", {}).items():
        tar = numbers["tar_at_far"].get("0.001")
        lines.append(
            f"| {name} | ten-fold accuracy {numbers['accuracy']:.4f} ± "
            f"{numbers['accuracy_std']:.4f} | TAR at FAR 1e-3 "
            f"{'–' if tar is None else f'{tar:.4f}'} |"
        )
    for name, numbers in found.get("identification", {}).get("sets", {}).items():
        lines.append(
            f"| {name} | rank 1 {numbers['rate']['1']:.4f} | {numbers['num_probes']:,} probes in "
            f"{numbers['num_gallery']:,} |"
        )
    return ["\n".join(lines)] if len(lines) > 2 else ["The run had no held-out sets."]


def _summary(trained: TrainedBackbone) -> tuple[Row, str]:
    """The run's summary; or nothing, and why there is none of this checkpoint."""
    summary = trained.run / "summary.json" if trained.run else None
    if summary is None or not summary.is_file():
        return {}, "None were measured with the run."
    found: Row = json.loads(summary.read_text(encoding="utf-8"))
    if found.get("steps") != trained.step:
        return {}, f"summary.json is of step {found.get('steps')}, not of this checkpoint."
    return found, ""
