"""Serve one small page on how a run is doing, from what lies in its folder; read-only.

    partialfc status runs/demo

On 127.0.0.1 unless another address is named: there is no password. For a cluster's machine,
``ssh -L 8765:127.0.0.1:8765 HOST`` brings it to yours.
"""

import http.server
import threading
from pathlib import Path

from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.errors import near
from partialfc.monitoring.serving import FewThreads, QuietHandler
from partialfc.status.page import page
from partialfc.status.run import BEGUN, RunFolder, has_run
from partialfc.writing import write_text

_NAMED = 5
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C; return the exit code."""
    parser = command_parser("status", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    add_plugin_option(parser)
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (default 8765)")
    parser.add_argument("--host", default="127.0.0.1", help="(default 127.0.0.1)")
    parser.add_argument("--every", type=int, default=5, help="seconds between reloads (default 5)")
    parser.add_argument("--out", type=Path, help="write the page here instead, once")
    options = parser.parse_args(arguments)
    refuse_no_run(options.run)
    folder = RunFolder(options.run.absolute())
    if options.out is not None:
        write_text(options.out, page(folder.look(), every=options.every))
        return 0
    try:
        server = serve(folder, options.host, options.port, options.every)
    except OSError as error:
        raise ValueError(
            f"--host {options.host} --port {options.port}: {error}. Try --port 0."
        ) from error
    print(f"http://{options.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


def refuse_no_run(folder: Path) -> None:
    """Refuse a folder in which no run has begun, and name those in it that have one.

    Raises:
        ValueError: If it is missing, or nothing in it is of a run.
    """
    if not folder.is_dir():
        said = "not a folder" if folder.exists() else f"there is no such folder. {near(folder)}"
        raise ValueError(f"{folder}: {said.rstrip('.')}. Name the run.folder of a run.")
    if not has_run(folder):
        runs = sorted(str(path) for path in folder.iterdir() if path.is_dir() and has_run(path))
        below = f" Runs are in {', '.join(runs[:_NAMED])}." if runs else ""
        raise ValueError(
            f"{folder}: there is no run: it has none of {', '.join(BEGUN)}. Name the run.folder of "
            f"a run that has begun.{below}"
        )


def serve(folder: RunFolder, host: str, port: int, every: int) -> "_Server":
    """Return a server of the page; one thread at a time looks at the disk, the others wait."""
    looking = threading.Lock()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            """Answer with the page, or 404 for any other path."""
            found = self.path in ("/", "/index.html")
            text = "There is one page: /"
            if found:
                with looking:
                    text = page(folder.look(), every=every)
            content = text.encode(errors="replace")
            self.send_response(200 if found else 404)
            kind = "html" if found else "plain"
            for name, value in {**_HEADERS, "Content-Type": f"text/{kind}; charset=utf-8"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return _Server((host, port), Handler)


class _Server(FewThreads, http.server.HTTPServer):
    """Of the page."""
