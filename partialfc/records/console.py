"""What a run shows on the terminal."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from partialfc.records.metrics import Values
from partialfc.words import rate

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """A bar with loss, throughput and time left; a line now and then where there is no terminal.

    Args:
        step: Steps taken already.
        total_steps: Steps of the run.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._shown = -_SECONDS_BETWEEN_LINES
        self._console = Console()
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=total_steps, completed=step, numbers="")
        self._last: dict[str, float] = {}
        self._bar.start()

    def write(self, step: int, values: Values) -> None:
        """Show a record."""
        self._last.update(values)
        numbers = _line(self._last)
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if self._bar.disable and (
            step == self._total
            or "verification_accuracy" in values
            or now - self._shown > _SECONDS_BETWEEN_LINES
        ):
            self._shown = now
            print(f"step {step}/{self._total}  {numbers}", flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


def _line(values: Values) -> str:
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.3f}")
        parts.append(f"{rate(values['throughput'])} images/s")
    if "verification_accuracy" in values:
        parts.append(f"accuracy {values['verification_accuracy']:.4f}")
    if "identification_rank_1" in values:
        parts.append(f"rank-1 {values['identification_rank_1']:.4f}")
    return "  ".join(parts)


def show_table(title: str, rows: dict[str, str]) -> None:
    """Print a small table of names and values, as they are: ``[red]`` of a path is no markup."""
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(markup=False).print(table)


def from_here(path: Path) -> Path:
    """Return a path as from the working folder, if it is below it: to be read and pasted."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
