"""Arrays to embeddings: of a run that was trained on some.

Shape suffixes: N = samples, D = embedding.
"""

import argparse

import numpy as np
from torch import from_numpy

from partialfc.checkpoint.trained_backbone import TrainedBackbone
from partialfc.commands._embed.files import Embeddings, write_embeddings
from partialfc.commands.evaluate import embedder, settings_of
from partialfc.data.arrays import ArrayFile
from partialfc.evaluation.embedding import embed_tensors
from partialfc.runtime.process import running


def embed_array(
    options: argparse.Namespace, trained: TrainedBackbone, shape: tuple[int, ...]
) -> int:
    """Embed the rows of an ``.npy``; return the exit status of the command.

    Raises:
        ValueError: If the file does not fit, or something is asked for that is for images.
        DataError: If a row has a number that is not finite.
    """
    if options.align or options.landmarks is not None or options.flip:
        raise ValueError("--align, --landmarks and --flip are for images; leave them out.")
    file = ArrayFile(options.images, shape)
    with running(settings_of(options.device)) as runtime:
        rows_ND = embed_tensors(
            embedder(trained, runtime, options.precision),
            str(options.images),
            len(file),
            lambda index: from_numpy(file.rows(np.array([index]))[0]),
            runtime,
            flip=False,
            threads=options.threads,
        )
        if runtime.leads:
            names = [str(number) for number in range(len(file))]
            found = Embeddings(names, [""] * len(file), rows_ND.astype(np.float32), None)
            write_embeddings(options.out, found)
            print(f"{options.out}: {len(file):,} embeddings of {rows_ND.shape[1]}")
    return 0
