"""Images in tar shards, as WebDataset writes them; of a shard the index is read, nothing else.

A place is ``SHARD.tar:offset:size``. Whose an image is says :mod:`partialfc.data.tars.listing`, for
training as for packing.
"""

from collections import defaultdict
from pathlib import Path

from partialfc.commands._bad_files import Fault
from partialfc.commands._command import tracked
from partialfc.commands._pack.survey import Survey
from partialfc.data.tars.listing import list_shard


def tar_images(shards: list[Path], survey: Survey) -> dict[str, list[str]]:
    """Return the places of the images of every identity, in the order of the shards.

    A shard that is damaged or cut is a fault that says where; the images before it are taken.
    """
    images: dict[str, list[str]] = defaultdict(list)
    for shard in tracked(shards, "shards listed"):
        with shard.open("rb") as file:
            found = list_shard(file, shard.stat().st_size)
        for image in found.images:
            images[image.identity].append(f"{shard.name}:{image.offset}:{image.size}")
        for name, count in found.ignored.items():
            survey.ignore(name, count)
        survey.faults += [Fault(f"{shard.name}: {name}", why) for name, why in found.faults]
        if found.broken:
            survey.faults.append(Fault(shard.name, f"{found.broken}; what is before is taken."))
    return images
