"""What Prometheus reads: the numbers of one rank, served over HTTP by a thread of their own.

A scrape reads numbers that lie in the host's memory; it takes no lock of the training and waits
for no GPU. A rank whose training hangs still answers: watch ``last_step_timestamp_seconds``, not
``up``. No path and no user's name is among the labels.
"""

import errno
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

from partialfc.monitoring.serving import FewThreads, QuietHandler

Labels = tuple[tuple[str, str], ...]
PREFIX = "partialfc_"


@dataclass(frozen=True, slots=True)
class Exported:
    """A metric in Prometheus: base units, and ``_total`` on what only grows in a process.

    Attributes:
        name: Without :data:`PREFIX`.
        help: What it means.
    """

    name: str
    help: str


OF_EVERY_RANK = (
    Exported("build_info", "Versions of this process; always 1"),
    Exported("run_info", "What is trained; always 1"),
    Exported("step", "Optimizer steps of the run"),
    Exported("last_step_timestamp_seconds", "When this rank ended its last step, Unix time"),
    Exported("steps_total", "Optimizer steps that this process took"),
    Exported("images_total", "Images that this rank trained on in this process"),
    Exported("phase_seconds_total", "Time of this process, by what it was spent on"),
    Exported("collective_wait_seconds_total", "Time of this rank in the head's collectives"),
    Exported("peak_memory_bytes", "Peak memory of this rank"),
)
OF_RANK_0 = (
    Exported("planned_steps", "Steps at the end of the run"),
    Exported("ranks", "World size"),
    Exported("starts", "How often the run was started, this time included"),
    Exported("failed_starts", "Earlier starts that ended in a fault"),
    Exported("last_failure_info", "Exit code of the last of them, killed without one; always 1"),
    Exported("checkpoint_last_step", "Step of the newest complete checkpoint"),
    Exported("checkpoint_last_timestamp_seconds", "When the newest checkpoint was complete"),
    Exported("checkpoint_size_bytes", "Size of the newest checkpoint"),
    Exported("loss_of_plugin", "Loss of a plug-in or a head at this step, without its weight"),
    Exported("epoch_of_set", "Passes over the images of one of several sets so far"),
    Exported("checkpoint_interval_steps", "Steps between checkpoints; 0 saves at the end only"),
    Exported("folder_free_bytes", "Free space where the run's folder is"),
    Exported("folder_size_bytes", "Space of the file system where the run's folder is"),
)


class Exporter:
    """Serves numbers until it is closed.

    Args:
        table: The metrics that may be set.
        host: Address to open the port on.
        port: Port, or 0 for any. One that is taken is replaced by any.
        certificate: With ``key``: serve HTTPS.
        key: Of the certificate.
        client_ca: Answer only who shows a certificate signed by one of these.

    Raises:
        OSError: If nothing can be served; the message says why.
    """

    def __init__(
        self,
        table: tuple[Exported, ...],
        host: str,
        port: int,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        client_ca: Path | None = None,
    ) -> None:
        self._table = {entry.name: entry for entry in table}
        self._values: dict[str, dict[Labels, float]] = {name: {} for name in self._table}
        self._looks: list[Callable[[], Mapping[str, float]]] = []
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        secure = None if certificate is None else _identity(certificate, key, client_ca)
        try:
            self._server = _server(host, port, registry, secure)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            self._server = _server(host, 0, registry, secure)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a number."""
        self._values[name][tuple(sorted(labels.items()))] = value

    def look(self, at: Callable[[], Mapping[str, float]]) -> None:
        """Call ``at`` at every scrape for numbers that are cheaper to look up than to keep."""
        self._looks.append(at)

    def collect(self) -> Iterator[Metric]:
        """Yield all numbers, in the words of prometheus_client."""
        for look in self._looks:
            for name, value in look().items():
                self.set(name, value)
        for name, samples in self._values.items():
            entry = self._table[name]
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(PREFIX + name, entry.help)
            metric.samples = [
                Sample(PREFIX + name, dict(labels), value) for labels, value in [*samples.items()]
            ]
            if metric.samples:
                yield metric

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(QuietHandler, WSGIRequestHandler):
    """Of a scrape."""


def _server(
    host: str, port: int, registry: CollectorRegistry, secure: ssl.SSLContext | None
) -> WSGIServer:
    """Open a port, IPv6 where the host is; a handshake is its connection's own affair."""
    where = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)

    class Server(FewThreads, WSGIServer):
        address_family = where[0][0]

    server = make_server(
        str(where[0][4][0]), port, make_wsgi_app(registry), Server, handler_class=_Handler
    )
    if secure is not None:
        server.socket = secure.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    return server


def _identity(certificate: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
