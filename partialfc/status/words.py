"""Numbers as people read them."""


def duration(seconds: float) -> str:
    """Return e.g. ``12 s``, ``3 min 20 s``, ``4 h 5 min`` or ``2 d 3 h``."""
    whole = int(seconds)
    for unit, following, name, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "min")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // following} {small}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def size(count: float) -> str:
    """Return bytes as e.g. ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
