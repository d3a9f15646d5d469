"""The report as HTML: numbers, curves, score histograms, ROC, time, checkpoints, settings.

Nothing is loaded from anywhere: the page works from a folder, by mail and without a network, on a
phone and on a desktop, in light and in dark.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from partialfc.records.metrics import NAMES
from partialfc.records.pages import Series, line_chart, render, steps_of, time_parts
from partialfc.records.report.read import RunFiles
from partialfc.words import duration, size
from partialfc.writing import write_text

Form = Callable[[float], str]
Key = tuple[tuple[int, str], ...]
"""Colours and what they stand for."""
Figure = tuple[str, str] | tuple[str, str, Key]
"""Title and chart, and its key unless its colours are those of the runs."""


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


_CURVES: tuple[tuple[str, str, Form | None, bool], ...] = (
    ("loss", "Loss", None, False),
    ("verification_accuracy", "Verification accuracy", _percent, False),
    ("verification_tar", "TAR at FAR 1e-3", _percent, False),
    ("identification_rank_1", "Rank-1 identification", _percent, False),
    ("learning_rate", "Learning rate", None, False),
    ("gradient_norm", "Gradient norm", None, True),
    ("throughput", "Images per second", None, False),
    ("data_wait_seconds", "Wait for data, seconds a step", None, False),
    ("peak_memory_bytes", "Peak memory of rank 0", size, False),
    ("goodput", "Goodput: share of time in training", _percent, False),
    ("loss_scale", "Loss scale", None, True),
)
_HEADLINE: tuple[tuple[str, Form, tuple[str, ...]], ...] = (
    ("ten-fold accuracy", _percent, ("verification", "accuracy")),
    ("at step 0", _percent, ("verification", "accuracy_untrained")),
    ("TAR at FAR 1e-3", _percent, ("verification", "tar_at_far", "0.001")),
    ("equal error rate", _percent, ("verification", "eer")),
    ("rank 1", _percent, ("identification", "rank_1")),
    ("loss", "{:.3f}".format, ("loss",)),
    ("steps", "{:,.0f}".format, ("steps",)),
    ("images/s", "{:,.0f}".format, ("images_per_second",)),
    ("time", duration, ("seconds",)),
    ("peak memory a rank", size, ("peak_memory_bytes",)),
    ("ranks", "{:.0f}".format, ("world_size",)),
)
_PEOPLE = 1000
"""Names that a page shows; identities.json has all."""
_FAINT = 7
"""Number of the grey colour."""
_FARS = {f"{10.0**-power:g}": f"1e-{power}" for power in range(1, 7)}
"""False accept rates as summary.json has them, and as people write them."""


def write_report(path: Path, runs: Sequence[RunFiles]) -> None:
    """Write the page of one or several runs, the whole file or none.

    Args:
        path: Replaced if it exists.
        runs: At least one; eight colours are told apart.
    """
    names = [run.name for run in runs]
    settings = _by_key([run.settings for run in runs])
    page = render(
        Path(__file__).with_name("report.html"),
        title=" · ".join(names),
        names=names,
        several=len(runs) > 1,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headline=_headline(runs),
        training=_training(runs),
        stages=[(run.name, *_stages(run)) for run in runs if run.stages],
        curves=[figure for name in _sets(runs) for figure in _curves(name, runs)],
        verified=_verified(runs),
        verified_head=[
            "set",
            "accuracy",
            *(f"TAR@{far}" for far in _FARS.values()),
            "EER",
            "AUC",
            "cosine threshold",
            "pairs",
        ],
        times=[
            (run.name, parts) for run in runs if (parts := time_parts(run.summary.get("spent", {})))
        ],
        checkpoints=[row for run in runs for row in _checkpoints(run)],
        people=[row for run in runs for row in _people(run)],
        settings=settings,
        differing=[row for row in settings if len(set(row[1:])) > 1 and row[0] != "run.folder"],
        environment=_by_key([run.summary.get("environment", {}) for run in runs]),
    )
    write_text(path, page)


def _headline(runs: Sequence[RunFiles]) -> list[list[str]]:
    """The numbers to look at first, each with its value of every run; one run's get a note."""
    rows = []
    for label, form, keys in _HEADLINE:
        cells = [_of(run, form, *keys) for run in runs]
        if any(cells):
            rows.append([label, *(cell or "–" for cell in cells)])
    sets = dict.fromkeys(name for run in runs for name in run.summary.get("epochs_of_sets", {}))
    for name in sets:
        cells = [_of(run, "{:,.1f}".format, "epochs_of_sets", name) for run in runs]
        rows.append([f"epochs of {name}", *(cell or "–" for cell in cells)])
    return rows if len(runs) > 1 else [[*row, ""] for row in rows]


def _training(runs: Sequence[RunFiles]) -> list[Figure]:
    figures: list[Figure] = []
    names = dict.fromkeys(name for run in runs for record in run.metrics for name in record)
    terms = [name for name in names if name.startswith("loss_") and name != "loss_scale"]
    heads = {key.split(".")[1] for run in runs for key in run.settings if key.startswith("heads.")}
    beside = [(name, _title(name.removeprefix("loss_"), heads), None, False) for name in terms]
    marks = [one.first for one in runs[0].stages[1:]] if len(runs) == 1 else []
    for name, title, form, log in (_CURVES[0], *beside, *_CURVES[1:]):
        series = [Series(run.name, *run.values(name), colour) for colour, run in enumerate(runs)]
        if name == "loss_scale" and all(set(one.y) <= {1.0} for one in series):
            continue
        if chart := line_chart(series, x_label="step", form=form, log_y=log, marks=marks):
            figures.append((title, chart))
    return figures


def _title(term: str, heads: Collection[str]) -> str:
    """Of the chart of a loss that is a part of the sum."""
    of = (name for name in heads if term == name or term.startswith(f"{name}_"))
    head = "" if f"loss_{term}" in NAMES else max(of, key=len, default="")
    inner = term.removeprefix(head).replace("_", ": ", 1) if head else term
    return f"{f'heads.{head}' if head else 'losses.'}{inner}, without its weight"


def _stages(run: RunFiles) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of a run's stages: what each changes, and where it ended."""
    keys = [*dict.fromkeys(key for one in run.stages for key in one.settings)]
    ends = [name for name in ("loss", "verification_accuracy") if run.values(name)[0]]
    rows = []
    for one in run.stages:
        within = [record for record in run.metrics if one.first < record["step"] <= one.last]
        last = {name: value for record in within for name, value in record.items()}
        cells = [f"{last[name]:.4f}" if last.get(name) is not None else "–" for name in ends]
        settings = [_setting(one.settings.get(key)) for key in keys]
        steps = f"{one.first:,} to {one.last:,}"
        rows.append([one.name, steps, f"{one.epochs:.4g}", *settings, *cells])
    words = [name.replace("_", " ") + " at its end" for name in ends]
    return ["stage", "steps", "epochs", *keys, *words], rows


def _sets(runs: Sequence[RunFiles]) -> list[str]:
    """Of runs that have measured them after step 0."""
    found = (name for run in runs for name, one in run.curves.items() if "far" in one)
    return list(dict.fromkeys(found))


def _curves(name: str, runs: Sequence[RunFiles]) -> list[Figure]:
    """ROC, DET and scores of a verification set."""
    having = [(i, one) for i, run in enumerate(runs) if "far" in (one := run.curves.get(name, {}))]
    lines = [(one, i) for i, one in having]
    key: Key = ()
    if len(runs) == 1 and (start := having[0][1].get("untrained")):
        lines.append((start, _FAINT))
        key = (0, "trained"), (_FAINT, "at step 0")
    hits = [Series(name, c["far"], c["tar"], colour) for c, colour in lines]
    misses = [Series(name, one.x, [1 - tar for tar in one.y], one.colour) for one in hits]
    far = "false accept rate"
    roc = line_chart(hits, x_label=far, form=_percent, log_x=True)
    det = line_chart(misses, x_label=far, form=_percent, log_x=True, log_y=True)
    figures: list[Figure] = [
        (f"ROC of {name}: true accept rate", roc, key),
        (f"DET of {name}: false reject rate", det, key),
    ]
    scores = {i: _scores(one) for i, one in having}
    every = [one for kinds in scores.values() for one in kinds]
    for number, kinds in scores.items():
        of = f" ({runs[number].name})" if len(runs) > 1 else ""
        chart = line_chart(kinds, x_label="cosine", form=_percent, filled=True, scale=every)
        colours = tuple((one.colour, one.name) for one in kinds)
        figures.append((f"Scores of {name}{of}: share of pairs", chart, colours))
    return figures


def _scores(curves: dict[str, Any]) -> list[Series]:
    return [
        Series(words, *steps_of(curves["edges"], curves[kind]), colour)
        for kind, words, colour in (
            ("same", "same person", 2),
            ("different", "different people", 1),
        )
    ]


def _verified(runs: Sequence[RunFiles]) -> list[list[str]]:
    rows = []
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
                    # Before threshold_at_far was written, the threshold was a squared distance.
                    f"{numbers['threshold']:.3f}" if "threshold_at_far" in numbers else "–",
                    f"{numbers['num_pairs']:,}",
                ]
            )
    return rows


def _checkpoints(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    if run.older:
        yield run.name, f"and {run.older:,} before", ""
    for step, count in run.checkpoints:
        yield run.name, f"{step:,}", size(count)


def _people(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Name of the run and the head, how many people it was trained on, and who, by number."""
    for head, names in run.people.items():
        shown = enumerate(names[:_PEOPLE])
        words = ", ".join(f"{number} {'–' if name is None else name}" for number, name in shown)
        more = len(names) - _PEOPLE
        name = f"{run.name}, heads.{head}" if head else run.name
        yield name, f"{len(names):,}", words + (f", and {more:,} more" if more > 0 else "")


def _by_key(values: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each key, with its value of every run."""
    keys = dict.fromkeys(key for one in values for key in one)
    return [[key, *(_setting(one.get(key)) for one in values)] for key in keys]


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or "–"
    if isinstance(value, bool):
        return str(value).lower()
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _of(run: RunFiles, form: Form, *keys: str) -> str:
    value: Any = run.summary
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return form(float(value)) if isinstance(value, int | float) else ""
