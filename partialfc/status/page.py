"""The page of a run: one HTML document that needs nothing else, not even a script."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from partialfc.records.ledger import Start
from partialfc.records.pages import Series, line_chart, render, time_parts
from partialfc.status.alarms import alarms
from partialfc.status.run import Look, RankAnswer
from partialfc.words import duration, size

_LISTED = 12
_FEW = 64
"""Ranks that are shown with their step."""

_CHARTS: tuple[tuple[str, str, Callable[[float], str] | None, bool], ...] = (
    ("Loss", "loss", None, True),
    ("Images/s", "throughput", None, False),
    ("Accuracy, held out", "verification_accuracy", "{:.1%}".format, False),
    ("Gradient norm", "gradient_norm", None, True),
)


def page(look: Look, *, every: int) -> str:
    """Return the page of a run, which reloads itself every so many seconds."""
    furthest = max((one.step or 0 for one in look.ranks), default=0)
    ranks = [_tile(one, furthest, few=len(look.ranks) <= _FEW) for one in look.ranks]
    odd = [one for one, tile in zip(look.ranks, ranks, strict=True) if tile.state != "good"]
    return render(
        Path(__file__).with_name("status.html"),
        title=look.name,
        tab=f"{look.name} {_share_done(look):.0%}",
        reload=every,
        state=_state(look),
        what=_what(look),
        done=_share_done(look),
        alarms=list(alarms(look)),
        numbers=_numbers(look),
        charts=_charts(look),
        wall=duration(look.spent.get("wall", 0.0)),
        times=time_parts(look.spent),
        ranks=ranks,
        odd=[
            (one.rank, one.address, "–", "no answer")
            if one.step is None
            else (one.rank, one.address, f"{one.step:,}", duration(one.age))
            for one in odd[:_LISTED]
        ],
        no_ranks=_no_ranks(look),
        checkpoints=[
            (f"{one.step:,}", size(one.bytes), _date(one.time))
            for one in look.checkpoints[:_LISTED]
        ],
        starts=[_start(start, start is look.starts[-1]) for start in look.starts[-_LISTED:]][::-1],
        count=len(look.starts),
        date=_date(look.now),
    )


def _what(look: Look) -> str:
    if look.config is None:
        return ""
    config = look.config
    return " · ".join(
        (
            config.backbone.name,
            config.head.margin.name,
            f"sample rate {config.head.sample_rate:g}",
            f"batch {config.data.global_batch:,}",
            config.precision.compute,
        )
    )


def _state(look: Look) -> tuple[str, str]:
    """What the run is doing, and how good that is."""
    ending = look.starts[-1].end if look.starts else None
    if look.ended and (ending is None or ending["code"] == 0):
        return "ended", "good"
    if ending is not None:
        words = {75: "preempted, to go on", 130: "stopped"}.get(ending["code"])
        return (words, "warn") if words else (f"failed, exit code {ending['code']}", "bad")
    if not look.metrics and not look.starts:
        return "nothing yet", "warn"
    if look.silence > 60:
        return f"silent for {duration(look.silence)}", "warn"
    return "running", "good"


def _planned(look: Look) -> int:
    """Steps of the whole run, as its epochs say; 0 if that is not known yet."""
    config = look.config
    if config is None:
        return 0
    if config.run.steps is not None:
        return config.run.steps
    epoch = look.last("epoch")
    return round(look.step / epoch * (config.run.epochs or 0)) if epoch else 0


def _share_done(look: Look) -> float:
    planned = _planned(look)
    return min(1.0, look.step / planned) if planned else 0.0


def _numbers(look: Look) -> list[tuple[str, str, str]]:
    """Label, value and note of each card."""
    planned, step_seconds = _planned(look), look.last("step_seconds")
    left = duration((planned - look.step) * step_seconds) if planned and step_seconds else "?"
    goodput = look.spent.get("goodput")
    cards = [
        ("step", f"{look.step:,}", f"of {planned:,}" if planned else ""),
        ("left", left if look.step < planned else "–", "at the present speed"),
        ("loss", _number(look.last("loss"), "{:.4f}"), "mean since the last record"),
        (
            "images/s",
            _number(look.last("throughput"), "{:,.0f}"),
            _number(step_seconds, "{:.3g} s a step"),
        ),
        ("goodput", _number(goodput, "{:.1%}"), "of all its time"),
    ]
    if (accuracy := look.last("verification_accuracy")) is not None:
        cards.append(("accuracy", f"{accuracy:.4f}", "ten-fold, held out"))
    if look.checkpoints:
        newest = look.checkpoints[0]
        ago = duration(max(0.0, look.now - newest.time))
        cards.append(("checkpoint", f"{newest.step:,}", f"{ago} ago"))
    cards.append(("disk", size(look.free), f"free of {size(look.size)}"))
    return cards


def _charts(look: Look) -> list[tuple[str, str]]:
    figures: list[tuple[str, str]] = []
    for title, name, form, log in _CHARTS:
        points = [(record["step"], record[name]) for record in look.metrics if name in record]
        series = Series(name, [step for step, _ in points], [value for _, value in points])
        figures.append((title, line_chart([series], x_label="step", form=form, log_y=log)))
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


def _no_ranks(look: Look) -> str:
    """Why no rank is shown, of a run that goes on."""
    if not look.starts or look.ended:
        return ""
    count = look.starts[-1].entries[0].get("ranks", "?")
    if look.closed:
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
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M:%S")
