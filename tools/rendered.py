"""Render a pack of faces of any size, and of other faces a verification and an identification set.

The faces are those of the demo. An image depends on its identity and its number alone, so a larger
pack begins with the faces of a smaller one:

    train.rec         identities to train on
    heldout.rec       other identities; the first image of each is the gallery
    verification.bin  pairs of these other identities
"""

import argparse
import sys
from pathlib import Path

from partialfc.cores import usable_cores
from tools._faces.packs import write_demo_packs


def main(arguments: list[str] | None = None) -> int:
    """Write the packs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the packs go")
    parser.add_argument("--identities", type=int, default=5000, help="to train on (5000)")
    parser.add_argument("--images", type=int, default=10, help="of each of them (10)")
    parser.add_argument("--held-out", type=int, default=500, help="other identities (500)")
    parser.add_argument("--probes", type=int, default=10, help="images of each of these (10)")
    parser.add_argument("--pairs", type=int, default=6000, help="verification pairs (6000)")
    options = parser.parse_args(arguments)
    for name in ("identities", "images", "held_out", "probes"):
        if getattr(options, name) < 2:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 2, got {getattr(options, name)}."
            )
    try:
        write_demo_packs(
            options.folder,
            identities=options.identities,
            images_per_identity=options.images,
            verification_identities=options.held_out,
            pairs=options.pairs,
            seed=2048,
            workers=usable_cores(),
            probes=options.probes,
        )
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
