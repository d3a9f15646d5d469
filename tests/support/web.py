"""Pages of servers of this machine, whatever proxy the environment names."""

import ssl
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from tests.support.waiting import PATIENCE


def fetched(url: str, *, context: ssl.SSLContext | None = None, seconds: float = PATIENCE) -> str:
    """Return what a URL gives.

    Args:
        url: Of http or https.
        context: What is trusted, for https.
        seconds: In which something must come.

    Raises:
        OSError: If nothing does, or it is refused.
    """
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    with opener.open(url, timeout=seconds) as reply:
        return str(reply.read(), "utf-8")
