"""Fill a template with values: what a page says stands in Python, how it looks in its template.

A template extends ``base.html`` and takes tables, cards and figures from ``parts.html``. Every
value is escaped, so a name or a setting is text, never a tag. A page loads nothing and runs no
script.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from partialfc.records.ledger import KINDS
from partialfc.records.pages.chart import colour
from partialfc.words import duration

_HERE = Path(__file__).parent
_STYLE = Markup((_HERE / "page.css").read_text(encoding="utf-8"))
_TIMES = {
    "train": "training",
    "data": "waiting for data",
    "save": "saving",
    "startup": "starting",
    "restore": "restoring",
    "recovery": "recovering",
    "wasted": "lost to failures",
    "other": "verification and other",
}
_LEAST_SECONDS = 0.05


def render(template: Path, *, title: str, **values: object) -> str:
    """Return a page as HTML.

    Args:
        template: A file that extends ``base.html``.
        title: Of the page, and of its tab unless ``tab`` is given.
        values: What the template names; one that is missing is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["colour"] = colour
    page = environment.get_template(template.name)
    return page.render({"title": title, "tab": title, "reload": 0, "style": _STYLE, **values})


class TimePart(NamedTuple):
    """A kind of time as a bar shows it: number of its colour, words, share in [0, 1], meaning."""

    colour: int
    words: str
    share: float
    meaning: str


def time_parts(spent: Mapping[str, float]) -> list[TimePart]:
    """Return the kinds that took any time; ``spent`` has seconds by kind of the ledger."""
    total = sum(spent.get(kind, 0.0) for kind in _TIMES)
    return [
        TimePart(
            number,
            f"{words} {duration(spent[kind])}, {spent[kind] / total:.1%}",
            spent[kind] / total,
            KINDS[kind],
        )
        for number, (kind, words) in enumerate(_TIMES.items())
        if spent.get(kind, 0.0) >= _LEAST_SECONDS
    ]
