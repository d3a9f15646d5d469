"""What is seen of a source besides its good images: what cannot be used, and what is no image."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """A file or folder that cannot be used, and why."""

    path: str
    why: str


@dataclass
class Survey:
    """What was seen of the source besides its images.

    Attributes:
        ignored: How many files and folders are no images by their names, by the ends of these.
        faults: What cannot be used.
    """

    ignored: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def ignore(self, name: str) -> None:
        """Take note of a file or folder that is no image by its name."""
        self.ignored[Path(name).suffix.lower() or Path(name).name] += 1
