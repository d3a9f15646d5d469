"""Several hosts on one machine: network namespaces with addresses and host names of their own.

A bridge in a namespace of its own joins them; the machine's own network is not touched.
"""

import shutil
import subprocess
from pathlib import Path


class Hosts:
    """``pfc0``, ``pfc1``, … at 10.77.0.10, .11, …; each has an interface ``ve0``, ``ve1``, …"""

    def __init__(self, count: int, disks: dict[int, tuple[Path, Path]] | None = None) -> None:
        """Disks of hosts: a folder of this machine, and where the host alone sees it."""
        self.count, self.disks = count, disks or {}

    def __enter__(self) -> "Hosts":
        self.__exit__()
        _ip("netns", "add", "pfcbr")
        _ip("-n", "pfcbr", "link", "add", "br0", "type", "bridge")
        for device in ("br0", "lo"):
            _ip("-n", "pfcbr", "link", "set", device, "up")
        names = "".join(f"{address(j)} pfc{j}\n" for j in range(self.count))
        for i in range(self.count):
            host = f"pfc{i}"
            _ip("netns", "add", host)
            peer = ["peer", "name", f"p{i}", "netns", "pfcbr"]
            _ip("link", "add", f"ve{i}", "netns", host, "type", "veth", *peer)
            _ip("-n", "pfcbr", "link", "set", f"p{i}", "master", "br0")
            _ip("-n", "pfcbr", "link", "set", f"p{i}", "up")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "addr", "add", f"{address(i)}/24", "dev", f"ve{i}")
            _ip("-n", host, "link", "set", f"ve{i}", "up")
            folder = Path("/etc/netns") / host
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")  # gloo looks itself up
        return self

    def __exit__(self, *_: object) -> None:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        for name in ("pfcbr", *(f"pfc{i}" for i in range(self.count))):
            if name in listed.split():
                _ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def cut(self, i: int) -> None:
        """Take the link of a host down."""
        _ip("-n", "pfcbr", "link", "set", f"p{i}", "down")

    def heal(self, i: int) -> None:
        """Take it up again."""
        _ip("-n", "pfcbr", "link", "set", f"p{i}", "up")

    def command(self, i: int, *words: str) -> list[str]:
        """A command as it runs on a host, under the host's name.

        Its /dev/shm is that of this command and what it starts, and is gone with the last of them.
        """
        disk = "mount --bind {} {}; ".format(*self.disks[i]) if i in self.disks else ""
        own = f'hostname pfc{i}; mount -t tmpfs tmpfs /dev/shm; {disk}exec "$@"'
        host = ["unshare", "--uts", "--mount", "sh", "-c", own, "sh"]
        return ["ip", "netns", "exec", f"pfc{i}", *host, *words]


def address(i: int) -> str:
    return f"10.77.0.1{i}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
