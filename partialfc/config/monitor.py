"""Settings of what Prometheus reads."""

from typing import Annotated

from pydantic import model_validator

from partialfc.config.schema import Section, UserPath
from partialfc.definitions import Range


class Monitor(Section):
    """What Prometheus can read; configs/monitoring has its rules, alerts and dashboard."""

    port: Annotated[int | None, Range(ge=0, le=65535)] = None
    """Port of the first rank of a host; the others take the next ones. One that is taken is
    replaced by a free one, and 0 always takes a free one. Left out, nothing is served."""

    host: str = "127.0.0.1"
    """Address that the ports are opened on. The default is reachable from this machine only;
    0.0.0.0 is reachable from everywhere, without a password."""

    targets: UserPath | None = None
    """Folder of Prometheus' file_sd_configs: the addresses of all ranks are in a file there while
    the run lasts."""

    certificate: UserPath | None = None
    """PEM file: metrics are served over HTTPS. Needs ``key``."""

    key: UserPath | None = None
    """PEM file of the certificate's private key."""

    client_ca: UserPath | None = None
    """PEM file: only clients with a certificate signed by one of these may read. Needs
    ``certificate``."""

    @model_validator(mode="after")
    def _goes_together(self) -> "Monitor":
        if self.port is None and self.host != type(self).model_fields["host"].default:
            raise ValueError(
                f'host = "{self.host}": nothing is served without a port. Set monitor.port, or '
                "remove host."
            )
        for name, needs in (
            ("targets", "port"),
            ("certificate", "port"),
            ("certificate", "key"),
            ("key", "certificate"),
            ("client_ca", "certificate"),
        ):
            if getattr(self, name) is not None and getattr(self, needs) is None:
                raise ValueError(
                    f'{name} = "{getattr(self, name)}": does nothing without monitor.{needs}. Set '
                    f"it, or remove {name}."
                )
        return self
