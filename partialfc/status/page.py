"""The page of a run: one HTML document that needs nothing else, not even a script."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from partialfc.config.heads import each_head
from partialfc.records.ledger import Start, was_stopped
from partialfc.records.pages import Series, line_chart, render, time_parts
from partialfc.status.alarms import alarms
from partialfc.status.run import RankAnswer, Snapshot
from partialfc.words import duration, rate, size

_LISTED = 12
_FEW = 64
"""Ranks that are shown with their step."""

_CHARTS: tuple[tuple[str, str, Callable[[float], str] | None, bool], ...] = (
    ("Loss", "loss", None, True),
    ("Images/s", "throughput", None, False),
    ("Accuracy, held out", "verification_accuracy", "{:.1%}".format, False),
    ("Gradient norm", "gradient_norm", None, True),
)


def page(run: Snapshot, *, every: int) -> str:
    """Return the page of a run, which reloads itself every so many seconds."""
    furthest = max((one.step or 0 for one in run.ranks), default=0)
    ranks = [_tile(one, furthest, few=len(run.ranks) <= _FEW) for one in run.ranks]
    odd = [one for one, tile in zip(run.ranks, ranks, strict=True) if tile.state != "good"]
    return render(
        Path(__file__).with_name("status.html"),
        title=run.name,
        tab=f"{run.name} {_share_done(run):.0%}",
        reload=every,
        state=_state(run),
        what=_what(run),
        done=_share_done(run),
        alarms=list(alarms(run)),
        numbers=_numbers(run),
        charts=_charts(run),
        wall=duration(run.spent.get("wall", 0.0)),
        times=time_parts(run.spent),
        ranks=ranks,
        odd=[
            (one.rank, one.address, "–", "no answer")
            if one.step is None
            else (one.rank, one.address, f"{one.step:,}", duration(one.age))
            for one in odd[:_LISTED]
        ],
        no_ranks=_no_ranks(run),
        checkpoints=[
            (f"{one.step:,}", size(one.bytes), _date(one.time)) for one in run.checkpoints
        ],
        starts=[_start(start, start is run.starts[-1]) for start in run.starts[-_LISTED:]][::-1],
        count=len(run.starts),
        date=_date(run.now),
    )


def _what(run: Snapshot) -> str:
    if run.config is None:
        return ""
    config, stage = run.config, run.stage
    if stage is not None and config.stages:
        number = [one.name for one in run.stages].index(stage.name)
        config = config.in_stages()[min(number, len(config.stages) - 1)]
    return " · ".join(
        (
            *([] if stage is None else [f"stage {stage.name}, to step {stage.last:,}"]),
            config.backbone.name,
            *(
                f"{name} {one.head.margin.name} · sample rate {one.head.sample_rate:g}".lstrip()
                for name, one in each_head(config).items()
            ),
            f"batch {config.data.global_batch:,}",
            config.precision.compute,
        )
    )


def _state(run: Snapshot) -> tuple[str, str]:
    """What the run is doing, and how good that is."""
    ending = run.starts[-1].end if run.starts else None
    if run.ended and (ending is None or ending["code"] == 0):
        return "ended", "good"
    if ending is not None:
        words = {75: "preempted, to go on"}.get(ending["code"])
        words = words or ("stopped" if was_stopped(ending) else None)
        return (words, "warn") if words else (f"failed, exit code {ending['code']}", "bad")
    if not run.metrics and not run.starts:
        return "nothing yet", "warn"
    if run.silence > 60:
        return f"silent for {duration(run.silence)}", "warn"
    return "running", "good"


def _planned(run: Snapshot) -> int:
    """Steps of the whole run, as its epochs say; 0 if that is not known yet."""
    config = run.config
    if run.stages:
        return run.stages[-1].last
    if config is None:
        return 0
    if config.run.steps is not None:
        return config.run.steps
    epoch = run.last("epoch")
    return round(run.step / epoch * (config.run.epochs or 0)) if epoch else 0


def _share_done(run: Snapshot) -> float:
    planned = _planned(run)
    return min(1.0, run.step / planned) if planned else 0.0


def _numbers(run: Snapshot) -> list[tuple[str, str, str]]:
    """Label, value and note of each card."""
    planned, step_seconds = _planned(run), run.last("step_seconds")
    left = duration((planned - run.step) * step_seconds) if planned and step_seconds else "?"
    goodput = run.spent.get("goodput")
    cards = [
        ("step", f"{run.step:,}", f"of {planned:,}" if planned else ""),
        ("left", left if run.step < planned else "–", "at the present speed"),
        ("loss", _number(run.last("loss"), "{:.4f}"), "mean since the last record"),
        (
            "images/s",
            "–" if (speed := run.last("throughput")) is None else rate(speed),
            _number(step_seconds, "{:.3g} s a step"),
        ),
        ("goodput", _number(goodput, "{:.1%}"), "of all its time"),
    ]
    if (accuracy := run.last("verification_accuracy")) is not None:
        cards.append(("accuracy", f"{accuracy:.4f}", "ten-fold, held out"))
    if run.checkpoints:
        newest = run.checkpoints[0]
        ago = duration(max(0.0, run.now - newest.time))
        cards.append(("checkpoint", f"{newest.step:,}", f"{ago} ago"))
    cards.append(("disk", size(run.free), f"free of {size(run.size)}"))
    return cards


def _charts(run: Snapshot) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    marks = [one.first for one in run.stages[1:]]
    for title, name, form, log in _CHARTS:
        points = [
            (record["step"], record[name]) for record in run.metrics if record.get(name) is not None
        ]
        series = Series(name, [step for step, _ in points], [value for _, value in points])
        figures.append(
            (title, line_chart([series], x_label="step", form=form, log_y=log, marks=marks))
        )
    return figures


class _Tile(NamedTuple):
    """A rank in one glance."""

    state: str
    words: str
    title: str


def _tile(one: RankAnswer, furthest: int, *, few: bool) -> _Tile:
    last, step = "no answer", "–"
    state = "bad"
    if one.step is not None:
        last, step = f"step {one.step}, {duration(one.age)} ago", str(one.step)
        state = "warn" if one.step < furthest - 1 or one.age > 60 else "good"
    title = f"rank {one.rank} at {one.address}: {last}, waits {1e3 * one.wait:.1f} ms a step"
    return _Tile(state, f"{one.rank}: {step}" if few else str(one.rank), title)


def _no_ranks(run: Snapshot) -> str:
    """Why no rank is shown, of a run that goes on."""
    if not run.starts or run.ended:
        return ""
    count = run.starts[-1].entries[0].get("ranks", "?")
    if run.closed:
        return (
            f"{count} ranks. They answer to those with a certificate of monitor.client_ca, and "
            "this page has none."
        )
    return (
        f"{count} ranks. With monitor.port and monitor.targets each of them shows its last step "
        "here."
    )


def _start(start: Start, last: bool) -> tuple[str, str, str, str]:
    first, resumed = start.entries[0], start.resumed_at
    cause = "not known yet" if last else "killed"
    if start.end is not None:
        cause = str(start.end["cause"])
    way = f"{'–' if resumed is None else f'{resumed:,}'} → {start.reached:,}"
    return _date(first["time"]), str(first.get("ranks", "")), way, cause


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _date(stamp: float) -> str:
    try:
        return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # no time that there is
        return "–"
