"""Measure a finished run beyond its own summary: the worker of tools/compare.py.

``python tools/_compare/measure.py RUN_FOLDER OUT`` loads the newest checkpoint and writes as JSON:
accuracy on training images, their angles to the own and to the nearest other center, and the rate
of open-set identification on the first identification set with half of its identities as
distractors.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from partialfc.data.packs.pack import Pack, open_pack
from partialfc.head.centers import stored_centers
from partialfc.keyed import key, permute
from partialfc.protocols.identification import first_of_each
from partialfc.protocols.open_set import open_set
from partialfc.training.open_run import OpenRun, open_run
from partialfc.writing import write_json

TRAINING_IMAGES = 4096
CHUNK = 64
"""Images whose cosines to all centers are held at once."""

BINS = np.arange(0, 182, 2)
"""Edges of the histograms, in degrees."""


def main(arguments: list[str]) -> int:
    """Run the worker; return its exit status."""
    folder, out = Path(arguments[0]), Path(arguments[1])
    with open_run(folder) as run:
        found = training_numbers(run)
        for path in run.config.verification.identification[:1]:
            found["open_set"] = open_set_numbers(run, open_pack(path))
    write_json(out, found)
    return 0


def training_numbers(run: OpenRun) -> dict[str, Any]:
    """Return accuracy and angles of a keyed sample of the training images.

    An image is recognised if its own center, of all centers, gives the largest logit without
    margin.
    """
    pack, head = run.dataset, run.model.head
    count = min(TRAINING_IMAGES, len(pack))
    which = permute(np.arange(count), len(pack), key(0, "compare"))
    identities = torch.from_numpy(pack.identities(which))
    embeddings = torch.from_numpy(
        run.evaluation.embed(run.model, "train", count, lambda i: pack.jpeg(int(which[i])))
    ).float()
    centers = stored_centers(head.centers, head.optimizer.states())
    directions = F.normalize(centers[:, : head.embedding_dim])
    keys = directions if head.margin.unit_centers else centers
    recognised, own_degrees, other_degrees = [], [], []
    for embedding, identity in zip(
        torch.split(embeddings, CHUNK), torch.split(identities, CHUNK), strict=True
    ):
        query = F.pad(embedding, (0, 1), value=1.0) if head.margin.bias else embedding
        nearest = (query @ keys.T).argmax(1) // head.centers_per_identity
        recognised.append(nearest == identity)
        cosine = (F.normalize(embedding) @ directions.T).clamp(-1, 1)
        cosine = cosine.view(len(cosine), -1, head.centers_per_identity).amax(2)
        own_degrees.append(cosine.gather(1, identity.unsqueeze(1)).squeeze(1).acos().rad2deg())
        other = cosine.scatter(1, identity.unsqueeze(1), -1.0).amax(1)
        other_degrees.append(other.acos().rad2deg())
    own, others = torch.cat(own_degrees).numpy(), torch.cat(other_degrees).numpy()
    return {
        "training_accuracy": float(torch.cat(recognised).double().mean()),
        "own_angle": float(own.mean()),
        "own_angle_std": float(own.std()),
        "other_angle": float(others.mean()),
        "own_histogram": np.histogram(own, BINS)[0].tolist(),
        "other_histogram": np.histogram(others, BINS)[0].tolist(),
    }


def open_set_numbers(run: OpenRun, pack: Pack) -> dict[str, Any]:
    """Return the identification rates with a keyed half of the identities as distractors."""
    identities = pack.identities(np.arange(len(pack)))
    embeddings = run.evaluation.embed(run.model, "heldout", len(pack), pack.jpeg)
    count = pack.num_identities
    known = np.isin(identities, permute(np.arange(-(-count // 2)), count, key(0, "known")))
    places = np.flatnonzero(known)
    gallery, probes = (places[part] for part in first_of_each(identities[places]))
    numbers = open_set(
        embeddings[gallery],
        identities[gallery],
        embeddings[probes],
        identities[probes],
        embeddings[~known],
    )
    return {
        "rate_at_fpir": {
            f"{target:g}": rate if rate == rate else None
            for target, rate in numbers.rate_at_fpir.items()
        },
        "num_probes": numbers.num_probes,
        "num_distractors": numbers.num_distractors,
        "num_gallery": numbers.num_gallery,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
