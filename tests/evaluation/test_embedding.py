"""What embeds held-out images has the kernels of every other process that does."""

import functools

import numpy as np
import pytest
import torch

from partialfc.evaluation import embedding
from partialfc.model.step import train_step
from tests.support.models import batch, flat_model, runtime, settings


def embedded(embed):
    ones = torch.ones(3, 8, 8)
    return embedding.embed_tensors(embed, "set", 3, lambda i: i * ones, runtime(), flip=False)


def test_cudnn_does_not_choose_by_a_race(monkeypatch):
    """It does in training; two evaluations of one checkpoint would differ in the last bits."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []
    found = embedded(lambda images: seen.append(torch.backends.cudnn.benchmark) or images)
    assert seen == [False]
    assert torch.backends.cudnn.benchmark
    assert found[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_the_choice_is_given_back_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(ZeroDivisionError):
        embedded(lambda images: 1 / 0)
    assert torch.backends.cudnn.benchmark


def test_embeddings_become_fp64_on_the_host(monkeypatch):
    """On a GPU they would take three times their memory there."""

    class OnDevice:
        def cpu(self):
            return torch.ones(3, 2)

    monkeypatch.setattr(embedding, "gather_rows", lambda rows, ranks: OnDevice())
    found = embedded(lambda images: images)
    assert found.dtype == np.float64
    assert found.shape == (3, 2)


def test_training_is_compiled_for_its_own_batches_and_evaluation_not_at_all(monkeypatch):
    """Held-out blocks of another size made the next training step compile for any size."""
    shapes = []

    def backend(graph, inputs):
        shapes.append([(*one.shape,) for one in inputs if isinstance(one, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config = settings(backbone={"compile": True})
    model = flat_model(config)
    for step in range(2):
        train_step(model, config, *batch(step, 24), 0.05)
        model.backbone.eval()
        embedded(lambda images: model.embed(images, model.backbone))
        model.train()
    assert len(shapes) == 1
    assert all(isinstance(side, int) for shape in shapes[0] for side in shape)
