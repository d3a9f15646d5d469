"""The page of a run: one HTML document that needs nothing else, not even a script."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from partialfc.records.ledger import KINDS, Start
from partialfc.status.alarms import alarms
from partialfc.status.chart import line_chart
from partialfc.status.run import Rank, Seen
from partialfc.words import duration, size

_COLOURS = {
    "train": "#2e9e6b",
    "data": "#4a90d9",
    "save": "#8e6bbf",
    "startup": "#c9a227",
    "restore": "#b5651d",
    "wasted": "#d64545",
    "recovery": "#e07b39",
    "other": "#8a94a0",
}
_LISTED = 12
_STYLE = Path(__file__).with_name("page.css").read_text()


def page(seen: Seen, *, every: int) -> str:
    """Return the page of a run, which reloads itself every so many seconds."""
    parts = (_head, _cards, _charts, _time, _ranks, _checkpoints_and_starts)
    body = "".join("".join(part(seen)) for part in parts)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="refresh" content="{every}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(seen.name)} {_share_done(seen):.0%}</title><style>{_STYLE}</style>"
        f"<main>{body}<p class=dim>As of {_date(seen.now)} UTC, reloaded every {every} s. "
        "Read-only.</p></main></html>"
    )


def _head(seen: Seen) -> Iterator[str]:
    word, colour = _state(seen)
    yield f"<h1>{escape(seen.name)}</h1>"
    yield f'<span class=badge style="background:{colour}">{word}</span> '
    if seen.config is not None:
        config = seen.config
        facts = (
            config.backbone.name,
            config.head.margin.name,
            f"sample rate {config.head.sample_rate:g}",
            f"batch {config.data.global_batch:,}",
            config.precision.compute,
        )
        yield f"<span class=dim>{escape(' · '.join(facts))}</span>"
    done = f"{_share_done(seen):.2%}"
    yield f'<div class=bar><i style="width:{done};background:var(--good)"></i></div>'
    sentences = [escape(sentence) for sentence in alarms(seen)]
    if sentences:
        yield f"<ul class=bad><li>{'<li>'.join(sentences)}</ul>"


def _state(seen: Seen) -> tuple[str, str]:
    ending = seen.starts[-1].end if seen.starts else None
    if seen.ended and (ending is None or ending["code"] == 0):
        return "ended", "var(--good)"
    if ending is not None:
        code = ending["code"]
        words = {75: "preempted, to go on", 130: "stopped"}
        return words.get(
            code, f"failed, exit code {code}"
        ), "var(--warn)" if code in words else "var(--bad)"
    if not seen.records and not seen.starts:
        return "nothing yet", "var(--warn)"
    silent = seen.silence > 60
    return (
        (f"silent for {duration(seen.silence)}", "var(--warn)")
        if silent
        else ("running", "var(--good)")
    )


def _planned(seen: Seen) -> int:
    """Steps of the whole run, as its epochs say; 0 if that is not known yet."""
    config = seen.config
    if config is None:
        return 0
    if config.run.steps is not None:
        return config.run.steps
    epoch = seen.last("epoch")
    return round(seen.step / epoch * (config.run.epochs or 0)) if epoch else 0


def _share_done(seen: Seen) -> float:
    planned = _planned(seen)
    return min(1.0, seen.step / planned) if planned else 0.0


def _cards(seen: Seen) -> Iterator[str]:
    planned, step_seconds = _planned(seen), seen.last("step_seconds")
    left = duration((planned - seen.step) * step_seconds) if planned and step_seconds else "?"
    speed = seen.last("throughput")
    cards = [
        ("step", f"{seen.step:,}", f"of {planned:,}" if planned else ""),
        ("left", left if seen.step < planned else "–", "at the present speed"),
        ("loss", _number(seen.last("loss"), "{:.4f}"), "mean since the last record"),
        ("images/s", _number(speed, "{:,.0f}"), _number(step_seconds, "{:.3g} s a step")),
        ("goodput", _number(seen.spent.get("goodput"), "{:.1%}"), "of all its time"),
    ]
    if (accuracy := seen.last("verification_accuracy")) is not None:
        cards.append(("accuracy", f"{accuracy:.4f}", "ten-fold, held out"))
    if seen.checkpoints:
        newest = seen.checkpoints[0]
        cards.append(
            ("checkpoint", f"{newest.step:,}", f"{duration(max(0.0, seen.now - newest.time))} ago")
        )
    cards.append(("disk", size(seen.free), f"free of {size(seen.size)}"))
    yield "<div class=cards>"
    for name, value, note in cards:
        yield f"<div class=box><span class=dim>{name}</span><b>{value}</b>"
        yield f"<span class=dim>{note}</span></div>"
    yield "</div>"


def _charts(seen: Seen) -> Iterator[str]:
    wanted: list[tuple[str, str, dict[str, bool]]] = [
        ("Loss", "loss", {"log": True}),
        ("Images/s", "throughput", {}),
        ("Accuracy, held out", "verification_accuracy", {"percent": True}),
        ("Gradient norm", "gradient_norm", {"log": True}),
    ]
    yield "<div class=grid2>"
    for title, name, how in wanted:
        points = [(record["step"], record[name]) for record in seen.records if name in record]
        if chart := line_chart(points, **how):
            yield f"<div class=box><h2>{title}</h2>{chart}</div>"
    yield "</div>"


def _time(seen: Seen) -> Iterator[str]:
    wall = seen.spent.get("wall", 0.0)
    if not wall:
        return
    kinds = [(kind, seen.spent[kind]) for kind in _COLOURS if seen.spent.get(kind, 0.0) > 0]
    yield f"<div class=box><h2>Where {duration(wall)} went</h2><div class='bar time'>"
    for kind, seconds in kinds:
        yield (
            f'<i style="width:{seconds / wall:.3%};background:{_COLOURS[kind]}" '
            f'title="{escape(KINDS[kind])}"></i>'
        )
    yield "</div><div class=key>"
    for kind, seconds in kinds:
        words = f"{kind} {duration(seconds)}, {seconds / wall:.1%}"
        yield f'<span style="--c:{_COLOURS[kind]}">{words}</span>'
    yield "</div></div>"


def _ranks(seen: Seen) -> Iterator[str]:
    if not seen.ranks:
        if seen.starts and not seen.ended:
            count = seen.starts[-1].entries[0].get("ranks", "?")
            how = (
                "They answer to those with a certificate of monitor.client_ca, and this page has "
                "none."
                if seen.closed
                else "With monitor.port and monitor.targets each of them shows its last step here."
            )
            yield (
                f"<div class=box><h2>Ranks</h2><span class=dim>{escape(str(count))} ranks. {how}"
                "</span></div>"
            )
        return
    furthest = max((one.step or 0 for one in seen.ranks), default=0)
    yield f"<div class=box><h2>Last step of {_ranks_of(seen)}</h2>"
    yield f'<div class=ranks style="--w:{"64px" if len(seen.ranks) <= 64 else "30px"}">'
    for one in seen.ranks:
        colour = _colour(one, furthest)
        step = "no answer" if one.step is None else f"step {one.step}, {duration(one.age)} ago"
        shown = (
            str(one.rank)
            if len(seen.ranks) > 64
            else f"{one.rank}: {one.step if one.step is not None else '–'}"
        )
        title = f"rank {one.rank} at {one.address}: {step}, waits {1e3 * one.wait:.1f} ms a step"
        yield f'<i style="background:{colour}" title="{escape(title)}">{shown}</i>'
    yield "</div><div class=key>"
    for colour, word in (
        ("var(--good)", "with the first"),
        ("var(--warn)", "behind, or no step for a minute"),
        ("var(--bad)", "no answer"),
    ):
        yield f'<span style="--c:{colour}">{word}</span>'
    yield "</div>"
    odd = [one for one in seen.ranks if _colour(one, furthest) != "var(--good)"][:_LISTED]
    if odd:
        rows = [
            (
                str(one.rank),
                one.address,
                "–" if one.step is None else f"{one.step:,}",
                duration(one.age) if one.step is not None else "no answer",
            )
            for one in odd
        ]
        yield _table(("rank", "address", "last step", "ago"), rows)
    yield "</div>"


def _ranks_of(seen: Seen) -> str:
    return "1 rank" if len(seen.ranks) == 1 else f"{len(seen.ranks)} ranks"


def _colour(one: Rank, furthest: int) -> str:
    if one.step is None:
        return "var(--bad)"
    return "var(--warn)" if one.step < furthest - 1 or one.age > 60 else "var(--good)"


def _checkpoints_and_starts(seen: Seen) -> Iterator[str]:
    yield "<div class=grid2>"
    if seen.checkpoints:
        rows: list[Sequence[str]] = [
            (f"{one.step:,}", size(one.bytes), _date(one.time))
            for one in seen.checkpoints[:_LISTED]
        ]
        table = _table(("step", "size", "complete, UTC"), rows)
        yield f"<div class=box><h2>Checkpoints</h2>{table}</div>"
    if seen.starts:
        rows = [_start(start, start is seen.starts[-1]) for start in seen.starts[-_LISTED:]]
        table = _table(("UTC", "ranks", "steps", "end"), rows[::-1])
        title = "Start" if len(seen.starts) == 1 else f"{len(seen.starts)} starts"
        yield f"<div class=box><h2>{title}</h2>{table}</div>"
    yield "</div>"


def _start(start: Start, last: bool) -> Sequence[str]:
    first, resumed = start.entries[0], start.resumed_at
    cause = "not known yet" if last else "killed"
    if start.end is not None:
        cause = str(start.end["cause"])
    way = f"{'–' if resumed is None else f'{resumed:,}'} → {start.reached:,}"
    return _date(first["time"]), str(first.get("ranks", "")), way, cause


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(text)}</th>" for text in head)]
    lines += ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _date(stamp: float) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M:%S")
