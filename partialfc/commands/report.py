"""Make the report of one run again, or of several runs side by side.

    partialfc report runs/mine                     # runs/mine/report.html
    partialfc report runs/a runs/b --out both.html

Every run makes its own at its end. The page is one file without anything outside it. A run that has
not ended is shown as far as it is.
"""

from pathlib import Path

from partialfc.commands._command import command_parser
from partialfc.records.report import read_run, write_report

MOST = 8


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help=f"folders of runs, at most {MOST}")
    parser.add_argument("--out", type=Path, help="the page (report.html of a single run)")
    options = parser.parse_args(arguments)
    if len(options.runs) > MOST:
        parser.error(f"{len(options.runs)} runs: at most {MOST}, which colours tell apart.")
    if len(options.runs) > 1 and options.out is None:
        parser.error("--out: name the page of several runs.")
    out = options.out or options.runs[0] / "report.html"
    write_report(out, [read_run(folder) for folder in options.runs])
    print(out)
    return 0
