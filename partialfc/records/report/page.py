"""The report as HTML: numbers, curves, score histograms, ROC, time, checkpoints, settings.

Nothing is loaded from anywhere: the page works from a folder, by mail and without a network, on a
phone and on a desktop, in light and in dark.
"""

import html
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from partialfc.records.report.chart import Series, legend, line_chart, steps_of
from partialfc.records.report.read import RunRecord
from partialfc.records.report.style import STYLE

Form = Callable[[float], str]

_KINDS = {
    "train": "training",
    "data": "waiting for data",
    "save": "saving",
    "startup": "starting",
    "restore": "restoring",
    "recovery": "recovering",
    "wasted": "lost to failures",
    "other": "verification and other",
}


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _mebi(value: float) -> str:
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


_CURVES: tuple[tuple[str, str, Form | None, bool], ...] = (
    ("loss", "Loss", None, False),
    ("verification_accuracy", "Verification accuracy", _percent, False),
    ("verification_tar", "TAR at FAR 1e-3", _percent, False),
    ("identification_rank_1", "Rank-1 identification", _percent, False),
    ("learning_rate", "Learning rate", None, False),
    ("gradient_norm", "Gradient norm", None, True),
    ("throughput", "Images per second", None, False),
    ("data_wait_seconds", "Wait for data, seconds a step", None, False),
    ("peak_memory_bytes", "Peak memory of rank 0", _mebi, False),
    ("goodput", "Goodput: share of time in training", _percent, False),
    ("loss_scale", "Loss scale", None, True),
)


def write_report(path: Path, runs: Sequence[RunRecord]) -> None:
    """Write the page of one or several runs, the whole file or none.

    Args:
        path: Replaced if it exists.
        runs: At least one; eight colours are told apart.
    """
    names = [run.name for run in runs]
    title = names[0] if len(names) == 1 else " · ".join(names)
    sections = [
        ("", _headline(runs)),
        ("Training", _training(runs)),
        ("Verification", _verification(runs)),
        ("Where the time went", _time(runs)),
        ("Checkpoints", _checkpoints(runs)),
        ("Settings", _settings(runs)),
        ("Environment", _environment(runs)),
    ]
    body = "".join(
        f"<section>{f'<h2>{name}</h2>' if name else ''}{content}</section>"
        for name, content in sections
        if content
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1><p>partialfc, {now}</p>"
        f"{legend(names) if len(names) > 1 else ''}</header>{body}</body></html>"
    )
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _headline(runs: Sequence[RunRecord]) -> str:
    """The numbers to look at first: cards of one run, a table of several."""
    rows: list[tuple[str, list[str]]] = []
    numbers: tuple[tuple[str, Callable[[RunRecord], str]], ...] = (
        ("ten-fold accuracy", lambda run: _of(run, _percent, "verification", "accuracy")),
        ("at step 0", lambda run: _of(run, _percent, "verification", "accuracy_untrained")),
        ("TAR at FAR 1e-3", lambda run: _of(run, _percent, "verification", "tar_at_far", "0.001")),
        ("equal error rate", lambda run: _of(run, _percent, "verification", "eer")),
        ("rank 1", lambda run: _of(run, _percent, "identification", "rank_1")),
        ("loss", lambda run: _of(run, lambda v: f"{v:.3f}", "loss")),
        ("steps", lambda run: _of(run, lambda v: f"{v:,.0f}", "steps")),
        ("images/s", lambda run: _of(run, lambda v: f"{v:,.0f}", "images_per_second")),
        ("time", lambda run: _of(run, _duration, "seconds")),
        ("peak memory a rank", lambda run: _of(run, _mebi, "peak_memory_bytes")),
        ("ranks", lambda run: _of(run, lambda v: f"{v:.0f}", "world_size")),
    )
    for label, value in numbers:
        cells = [value(run) for run in runs]
        if any(cells):
            rows.append((label, [cell or "–" for cell in cells]))
    if not rows:
        return "<p>No summary yet: the run has not ended.</p>"
    if len(runs) == 1:
        cards = "".join(f"<div><b>{cell[0]}</b><span>{label}</span></div>" for label, cell in rows)
        return f'<div class="cards">{cards}</div>'
    return _table(["", *(run.name for run in runs)], [[label, *cells] for label, cells in rows])


def _training(runs: Sequence[RunRecord]) -> str:
    figures = []
    for name, title, form, log in _CURVES:
        series = [Series(run.name, *run.values(name), colour) for colour, run in enumerate(runs)]
        if name == "loss_scale" and all(set(one.y) <= {1.0} for one in series):
            continue
        figures.append((title, line_chart(series, x_label="step", form=form, log_y=log)))
    return _grid(figures)


def _verification(runs: Sequence[RunRecord]) -> str:
    figures, rows = [], []
    sets = list(dict.fromkeys(name for run in runs for name in run.curves))
    for name in sets:
        having = [(i, run.curves[name]) for i, run in enumerate(runs) if name in run.curves]
        series = [Series(name, c["far"], c["tar"], i) for i, c in having]
        chart = line_chart(series, x_label="false accept rate", form=_percent, log_x=True)
        figures.append((f"ROC of {name}: true accept rate", chart))
        misses = [Series(name, c["far"], [1 - tar for tar in c["tar"]], i) for i, c in having]
        chart = line_chart(
            misses, x_label="false accept rate", form=_percent, log_x=True, log_y=True
        )
        figures.append((f"DET of {name}: false reject rate", chart))
        for number, one in having:
            kinds = [
                Series(kind, *steps_of(one["edges"], one[kind]), colour)
                for kind, colour in (("same", 2), ("different", 1))
            ]
            of = f" ({runs[number].name})" if len(runs) > 1 else ""
            chart = line_chart(kinds, x_label="cosine", form=_percent, filled=True)
            figures.append((f"Scores of {name}{of}: same and different", chart))
    for run in runs:
        for name, numbers in run.summary.get("verification", {}).get("sets", {}).items():
            tars = [numbers["tar_at_far"].get(key) for key in _FARS]
            rows.append(
                [
                    f"{run.name}: {name}" if len(runs) > 1 else name,
                    f"{100 * numbers['accuracy']:.2f} ± {100 * numbers['accuracy_std']:.2f} %",
                    *("–" if tar is None else f"{100 * tar:.2f} %" for tar in tars),
                    f"{100 * numbers['eer']:.2f} %",
                    f"{numbers['auc']:.5f}",
                    f"{numbers['num_pairs']:,}",
                ]
            )
    tars_at = [f"TAR@{far}" for far in _FARS.values()]
    head = ["set", "accuracy", *tars_at, "EER", "AUC", "pairs"]
    return (_table(head, rows) if rows else "") + _grid(figures)


_FARS = {f"{10.0**-power:g}": f"1e-{power}" for power in range(1, 7)}
"""False accept rates as summary.json has them, and as people write them."""


def _time(runs: Sequence[RunRecord]) -> str:
    bars = []
    for run in runs:
        spent = run.summary.get("spent", {})
        total = sum(spent.get(kind, 0.0) for kind in _KINDS)
        if total <= 0:
            continue
        parts = [(number, kind, spent.get(kind, 0.0)) for number, kind in enumerate(_KINDS)]
        pieces = "".join(
            f'<i class="c{number}" style="flex:{seconds / total:.5f}"></i>'
            for number, _, seconds in parts
            if seconds > 0
        )
        words = "".join(
            f'<span><i class="c{number}"></i>{_KINDS[kind]} {_duration(seconds)}</span>'
            for number, kind, seconds in parts
            if seconds >= 0.05
        )
        name = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        bars.append(f'{name}<div class="bar">{pieces}</div><p class="legend">{words}</p>')
    return "".join(bars)


def _checkpoints(runs: Sequence[RunRecord]) -> str:
    rows = [[run.name, f"{step:,}", _mebi(size)] for run in runs for step, size in run.checkpoints]
    return _table(["run", "step", "size"], rows) if rows else ""


def _settings(runs: Sequence[RunRecord]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(_setting(run.settings.get(key)) for run in runs)] for key in keys]
    head = ["", *(run.name for run in runs)]
    if len(runs) == 1:
        return f"<details><summary>all settings</summary>{_table(head, rows)}</details>"
    differ = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "run.folder"]
    shown = _table(head, differ) if differ else "<p>No setting differs.</p>"
    return f"{shown}<details><summary>all settings</summary>{_table(head, rows)}</details>"


def _environment(runs: Sequence[RunRecord]) -> str:
    found = [run.summary.get("environment", {}) for run in runs]
    keys = list(dict.fromkeys(key for one in found for key in one))
    rows = [[key, *(_setting(one.get(key)) for one in found)] for key in keys]
    return _table(["", *(run.name for run in runs)], rows) if rows else ""


def _grid(figures: list[tuple[str, str]]) -> str:
    shown = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>{chart}</figure>"
        for title, chart in figures
        if chart
    )
    return f'<div class="grid">{shown}</div>' if shown else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "–"
    if isinstance(value, bool):
        return str(value).lower()
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _of(run: RunRecord, form: Form, *keys: str) -> str:
    value: Any = run.summary
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return form(float(value)) if isinstance(value, int | float) else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
