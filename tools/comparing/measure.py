"""Measure a finished run beyond its own summary: the worker of tools/compare.py.

``python tools/comparing/measure.py RUN_FOLDER OUT`` loads the newest checkpoint and writes as JSON:
accuracy on training images, their angles to the own and to the nearest other center, and the rate
of open-set identification with half of the held-out identities as distractors.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from partialfc.data.records import Pack, open_pack
from partialfc.finished import Finished, finished
from partialfc.permutation import key, permute
from partialfc.protocols.identification import first_of_each
from partialfc.protocols.open_set import open_set
from partialfc.row_format import decode

TRAINING_IMAGES = 4096
BINS = np.arange(0, 182, 2)
"""Edges of the histograms, in degrees."""


def main(arguments: list[str]) -> int:
    """Run the worker; return its exit status."""
    folder, out = Path(arguments[0]), Path(arguments[1])
    with finished(folder) as run:
        found = training_numbers(run)
        for path in run.config.verification.identification[-1:]:
            found["open_set"] = open_set_numbers(run, open_pack(path))
    out.write_text(json.dumps(found))
    return 0


def training_numbers(run: Finished) -> dict[str, Any]:
    """Return accuracy and angles of a keyed sample of the training images.

    An image is recognised if its own center, of all centers, gives the largest logit without
    margin.
    """
    pack, model = run.pack, run.model
    count = min(TRAINING_IMAGES, len(pack))
    which = permute(np.arange(count), len(pack), key(0, "compare"))
    identities = torch.from_numpy(pack.identities(which))
    embeddings = run.evaluation.embed(model, "train", count, lambda i: pack.jpeg(int(which[i])))
    head, margin = model.head, model.head.margin
    scale = head.optimizer.states().get("centers_scale")
    centers = decode(head.centers.detach(), scale).double()
    embedding = torch.from_numpy(embeddings)
    query = F.pad(embedding, (0, 1), value=1.0) if margin.bias else embedding
    keys = F.normalize(centers) if margin.unit_centers else centers
    recognised = (query @ keys.T).argmax(1) // head.centers_per_identity == identities

    directions = F.normalize(centers[:, : head.embedding_dim])
    cosine = F.normalize(embedding) @ directions.T
    cosine = cosine.view(count, -1, head.centers_per_identity).amax(2).clamp(-1, 1)
    own = cosine.gather(1, identities.unsqueeze(1)).squeeze(1)
    other = cosine.scatter(1, identities.unsqueeze(1), -2.0).amax(1)
    own_degrees, other_degrees = own.acos().rad2deg().numpy(), other.acos().rad2deg().numpy()
    return {
        "training_accuracy": float(recognised.double().mean()),
        "own_angle": float(own_degrees.mean()),
        "own_angle_std": float(own_degrees.std()),
        "other_angle": float(other_degrees.mean()),
        "own_histogram": np.histogram(own_degrees, BINS)[0].tolist(),
        "other_histogram": np.histogram(other_degrees, BINS)[0].tolist(),
    }


def open_set_numbers(run: Finished, pack: Pack) -> dict[str, Any]:
    """Return the identification rates with every second identity as distractors."""
    identities = pack.identities(np.arange(len(pack)))
    embeddings = run.evaluation.embed(run.model, "heldout", len(pack), pack.jpeg)
    known = np.flatnonzero(identities % 2 == 0)
    gallery, probes = (known[part] for part in first_of_each(identities[known]))
    numbers = open_set(
        embeddings[gallery],
        identities[gallery],
        embeddings[probes],
        identities[probes],
        embeddings[identities % 2 == 1],
    )
    return {
        "rate_at_fpir": {f"{target:g}": rate for target, rate in numbers.rate_at_fpir.items()},
        "num_probes": numbers.num_probes,
        "num_distractors": numbers.num_distractors,
        "num_gallery": numbers.num_gallery,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
