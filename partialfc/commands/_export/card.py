"""The model card: what a file of weights is, in words, from what its run left behind."""

import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from partialfc.checkpoint.recognition import Known
from partialfc.checkpoint.trained_backbone import TrainedBackbone
from partialfc.config import to_toml
from partialfc.writing import write_text

Row = dict[str, Any]

_ONNX = ("onnx", "fp16", "int8")
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
    """
    known = trained.known
    pixels = "0 to 255" if inside else "(pixel - 127.5) / 127.5"
    parts = [
        f"# {trained.name}",
        f"{known.name} for face recognition: an aligned RGB image of {known.image_size} x "
        f"{known.image_size} pixels to an embedding of {known.embedding_dim} numbers. Two faces "
        "are compared by the cosine of their embeddings.",
        "## Files",
        _files(rows, checked_on),
        f"ONNX input `input.1` [batch, 3, {known.image_size}, {known.image_size}], RGB, "
        f"{pixels}; output `embedding` [batch, {known.embedding_dim}], not normalised. "
        "insightface's ArcFaceONNX takes the files as they are.",
        "## Use",
        *_use(known, rows, inside, flip, checked_on),
        "## Training",
        *_training(trained, licence),
        "## Numbers",
        *_numbers(trained),
        "## Intended use and limits",
        _LIMITS,
        f"Written {date.today().isoformat()} by partialfc's partialfc export.",
    ]
    write_text(path, "\n\n".join(part.strip() for part in parts) + "\n")


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


def _use(known: Known, rows: list[Row], inside: bool, flip: bool, checked_on: str) -> Iterator[str]:
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
    if row["format"] not in _ONNX:
        yield "`partialfc embed` takes the safetensors; `torch.export.load` the .pt2."
        return
    x = "pixels.transpose(2, 0, 1)"
    x, size = x if inside else f"({x} - 127.5) / 127.5", known.image_size
    mirrored = "  # and mirrored, as measured" if flip else ""
    batch = "np.stack([x, x[:, :, ::-1]])" if flip else "x[None]"
    yield f"""```python
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{row["file"]}", providers=["CPUExecutionProvider"])

def embed(path):  # of an aligned face
    pixels = np.asarray(Image.open(path).convert("RGB").resize(({size}, {size})), np.float32)
    x = {x}
    row = session.run(None, {{"input.1": {batch}}})[0].sum(0){mirrored}
    return row / np.linalg.norm(row)

print(embed("one.jpg") @ embed("other.jpg"))  # the cosine
```"""


def _training(trained: TrainedBackbone, licence: str) -> list[str]:
    if trained.config is None:
        return [f"Unknown: only the weights were given. Licence of the training data: {licence}."]
    config = trained.config
    names = ", ".join(path.name for path in config.data.train)
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
    summary = trained.run / "summary.json" if trained.run else None
    if summary is None or not summary.is_file():
        return ["None were measured with the run."]
    found = json.loads(summary.read_text(encoding="utf-8"))
    if found.get("steps") != trained.step:
        return [f"summary.json is of step {found.get('steps')}, not of this checkpoint."]
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
