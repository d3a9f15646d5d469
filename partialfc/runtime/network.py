"""Which of its addresses a host gives to the others, and whether that is one they can reach."""

import os
import socket
import struct
import sys
from contextlib import suppress

_ELSEWHERE = "192.0.2.1"
"""Nobody's, for documentation (RFC 5737): no packet is sent to it."""


def refuse_unreachable() -> str | None:
    """Look at the address that gloo will take here, where there are several hosts.

    NCCL has its own setting and takes no loopback by itself, so only what is set is looked at.

    Returns:
        A warning, if another interface is the one that leads to the first host; else ``None``.

    Raises:
        OSError: If the address is one that no other host can reach; the message says what to set.
    """
    master = os.environ.get("MASTER_ADDR", "")
    if _hosts() < 2 or sys.platform != "linux":
        return None
    right = _address_towards(master)
    if right is None or right.startswith("127."):
        return None  # all "hosts" are this machine
    should = f"{_interface_of(right) or 'the one of ' + right} ({right}) leads to {master}"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = os.environ.get(variable, "").split(",")[0].lstrip("=")
        if name.startswith("^"):
            continue
        taken = address_of(name) if name else _own() if variable.startswith("GLOO") else right
        how = f"{variable} = {name!r}" if name else f"{variable} is not set, and this host's name"
        if taken is None or taken == right:
            continue
        if taken.startswith("127."):
            raise OSError(
                f"{how} is {taken}, which no other host can reach; {should}. Set "
                f"{variable}={_interface_of(right)}."
            )
        return f"{how} is {taken}, but {should}. If ranks do not find each other, set {variable}."
    return None


def own_address() -> str:
    """The address by which the other ranks reach this host; 127.0.0.1 where there is one host.

    That of the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, or of the one that
    leads to rank 0: on its own host, that leads elsewhere.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = os.environ.get(variable, "").split(",")[0].lstrip("=")
        if name and not name.startswith("^") and (chosen := address_of(name)):
            return chosen
    if _hosts() < 2:
        return "127.0.0.1"
    found = _address_towards(os.environ.get("MASTER_ADDR", ""))
    if found is None or found.startswith("127."):
        found = _address_towards(_ELSEWHERE) or found
    return found or _own() or "127.0.0.1"


def resolve_once() -> None:
    """Put the address of rank 0's host in the place of its name, if it has no other: whatever
    connects to the store would ask for it again, on every rank."""
    with suppress(OSError):
        answers = socket.getaddrinfo(
            os.environ.get("MASTER_ADDR") or "", 0, type=socket.SOCK_STREAM
        )
        if len(found := {str(answer[4][0]) for answer in answers}) == 1:
            os.environ["MASTER_ADDR"] = found.pop()


def refuse_missing(*variables: str) -> None:
    """Look whether the interfaces that were chosen for talking to other ranks are there.

    Args:
        variables: Of GLOO_SOCKET_IFNAME, which takes names, and NCCL_SOCKET_IFNAME, which takes
            beginnings, ``=`` and a name, or ``^`` and what it may not be.

    Raises:
        OSError: If one is not; the message says which there are.
    """
    there = [name for _, name in socket.if_nameindex()]
    for variable in variables:
        for name in filter(None, os.environ.get(variable, "").split(",")):
            exact = variable.startswith("GLOO") or name.startswith("=")
            if name.startswith("^"):
                break
            if not any(one == name.lstrip("=") if exact else one.startswith(name) for one in there):
                raise OSError(
                    f"{variable} = {os.environ[variable]!r}: this host has no interface {name!r}. "
                    f"Set one of {', '.join(there)}, or unset it."
                )


def stale_store() -> str | None:
    """A warning where torchrun may hand out the addresses of ranks that are gone.

    It keeps one store for all rounds of a run and counts restarts on each host for itself; after a
    host is lost or joins, the hosts no longer agree on the count, nor on whose addresses they read.
    """
    elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    shared = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1"
    if not (elastic and shared and _hosts() > 1):
        return None
    return (
        "torchrun --max-restarts on several hosts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
        "its environment, or ranks may not find each other after a restart."
    )


def _hosts() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface, or of the first one whose name begins so, as gloo takes."""
    for _, name in socket.if_nameindex():
        if name.startswith(interface):
            import fcntl

            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                try:
                    wanted = struct.pack("256s", name.encode()[:15])
                    answer = fcntl.ioctl(probe.fileno(), 0x8915, wanted)  # SIOCGIFADDR
                except OSError:
                    continue
                return socket.inet_ntoa(answer[20:24])
    return None


def _interface_of(address: str) -> str | None:
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if address_of(name) == address), None)


def _own() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _address_towards(host: str) -> str | None:
    """The address that this host would send from; nothing is sent."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    return None
