"""What is seen of a source besides its good images."""

from collections import Counter
from dataclasses import dataclass, field

from partialfc.commands._bad_files import Fault, end_of


@dataclass
class Survey:
    """What was seen of the source besides its images.

    Attributes:
        ignored: How many files and folders are no images by their names, by the ends of these.
        faults: What cannot be used.
    """

    ignored: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def ignore(self, name: str, count: int = 1) -> None:
        """Take note of a file or folder, or ``count`` of them, that is no image by its name."""
        self.ignored[end_of(name)] += count
