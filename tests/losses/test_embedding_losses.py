"""Losses on embeddings against loops over pairs in fp64, and pytorch-metric-learning."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners, reducers

from partialfc.losses import LOSSES, Contrastive, Triplet, Uniformity
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from tests.support.every_loss import EVERY_LOSS, found_of, problem
from tests.support.reference import relative_error

SQUARED = distances.LpDistance(power=2, normalize_embeddings=True)


def by_loops(loss, embeddings, labels):
    """Every pair and triplet written out, in fp64."""
    unit = F.normalize(embeddings)
    square = [[((a - b) ** 2).sum() for b in unit] for a in unit]
    rows = range(len(unit))
    same = [(a, p) for a, p in itertools.permutations(rows, 2) if labels[a] == labels[p]]
    other = [(a, n) for a, n in itertools.permutations(rows, 2) if labels[a] != labels[n]]
    if isinstance(loss, Contrastive):
        together = [square[a][p] / 2 for a, p in same]
        short = [loss.margin - square[a][n].sqrt() for a, n in other]
        apart = [d**2 / 2 for d in short if d > 0]
        return sum(together) / len(together) + sum(apart) / len(apart)
    if isinstance(loss, Uniformity):
        kernel = [(-loss.sharpness * square[a][n]).exp() for a, n in other]
        return (sum(kernel) / len(kernel)).log()
    hinges = []
    if loss.mining == "semi_hard":
        for a, p in same:
            farther = [square[a][n] for i, n in other if i == a and square[a][n] > square[a][p]]
            if farther:
                hinges.append((square[a][p] - min(farther) + loss.margin).clamp(min=0))
    else:
        for a in rows:
            positive = [square[a][p] for i, p in same if i == a]
            negative = [square[a][n] for i, n in other if i == a]
            hinges.append((max(positive) - min(negative) + loss.margin).clamp(min=0))
    return sum(hinges) / len(hinges)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_value_and_gradient_equal_loops_over_pairs(name):
    """Mining a wrong pair, a wrong mean or a wrong projection."""
    embeddings, labels = problem()
    truth = embeddings.double().requires_grad_()
    expected = by_loops(EVERY_LOSS[name], truth, labels)
    expected.backward()
    value, gradient = found_of(EVERY_LOSS[name], embeddings, labels)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert truth.grad.norm() > 0
    assert relative_error(gradient, truth.grad) < 1e-5


def test_batch_hard_is_that_of_pytorch_metric_learning():
    embeddings, labels = problem(seed=1)
    loss = losses.TripletMarginLoss(margin=0.7, distance=SQUARED, reducer=reducers.MeanReducer())
    own = embeddings.double().requires_grad_()
    expected = loss(own, labels, miners.BatchHardMiner(distance=SQUARED)(own, labels))
    expected.backward()
    value, gradient = found_of(Triplet(margin=0.7, mining="batch_hard"), embeddings, labels)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert relative_error(gradient, own.grad) < 1e-5


def test_semi_hard_has_the_hardest_of_its_triplets():
    """Theirs has every negative inside the margin, ours the nearest: the same pairs have one."""
    embeddings, labels = problem(seed=2)
    miner = miners.TripletMarginMiner(0.3, type_of_triplets="semihard", distance=SQUARED)
    anchors, positives, negatives = miner(embeddings.double(), labels)
    square = SQUARED(F.normalize(embeddings.double()))
    hinge = {}
    for a, p, n in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True):
        hinge[a, p] = max(hinge.get((a, p), 0.0), float(square[a, p] - square[a, n] + 0.3))
    assert len(hinge) > 10
    counted = sum(
        bool(((square[a] > square[a, p]) & (labels != labels[a])).any())
        for a, p in itertools.permutations(range(len(labels)), 2)
        if labels[a] == labels[p]
    )
    value, _ = found_of(Triplet(margin=0.3), embeddings, labels)
    assert float(value) == pytest.approx(sum(hinge.values()) / counted, rel=1e-5)


def test_contrastive_has_the_pairs_of_pytorch_metric_learning():
    """Theirs has the distances, ours half their squares."""
    embeddings, labels = problem(seed=3)
    theirs = losses.ContrastiveLoss(
        pos_margin=0,
        neg_margin=1.2,
        distance=distances.LpDistance(power=1, normalize_embeddings=True),
        reducer=reducers.DoNothingReducer(),
    )(embeddings.double(), labels)
    together, apart = theirs["pos_loss"]["losses"], theirs["neg_loss"]["losses"]
    expected = (together**2 / 2).mean() + (apart[apart > 0] ** 2 / 2).mean()
    value, _ = found_of(Contrastive(margin=1.2), embeddings, labels)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("name", EVERY_LOSS)
@pytest.mark.parametrize("identities", [1, 8])
def test_a_batch_without_pairs_is_finite(name, identities):
    """Every image an identity of its own, or all of one: no NaN from an empty mean."""
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(8) % identities
    value, gradient = found_of(EVERY_LOSS[name], embeddings, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if name in ("semi-hard", "batch-hard"):
        assert value == 0


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_equal_and_zero_embeddings_are_finite(name):
    """A distance of 0 has no direction."""
    embeddings = torch.ones(6, 4)
    embeddings[5] = 0
    value, gradient = found_of(EVERY_LOSS[name], embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_row_that_is_not_finite_shows_in_the_loss(name):
    """Mining leaves out a pair with NaN, and the run must stop all the same."""
    embeddings, labels = problem()
    embeddings[3, 0] = torch.nan
    assert found_of(EVERY_LOSS[name], embeddings, labels)[0].isnan()


def test_weights_and_terms():
    """The sum is weighted, the terms are not."""
    embeddings, labels = problem()
    both = EmbeddingLosses({"a": Weighted(Triplet(), 0.5), "b": Weighted(Uniformity(), 3.0)})
    value = both(embeddings, labels)
    assert float(value) == pytest.approx(0.5 * float(both.terms["a"]) + 3 * float(both.terms["b"]))
    gradient = found_of(Triplet(), embeddings, labels, weight=0.5)[1]
    gradient += found_of(Uniformity(), embeddings, labels, weight=3.0)[1]
    own = embeddings.clone().requires_grad_()
    both(own, labels).backward()
    assert relative_error(own.grad, gradient.double()) < 1e-6


def test_uniformity_is_within_its_range():
    """Opposite pairs have the smallest value, equal ones 0."""
    labels = torch.tensor([0, 1])
    opposite = torch.tensor([[1.0, 0], [-1, 0]])
    assert float(found_of(Uniformity(), opposite, labels)[0]) == pytest.approx(-8)
    assert float(found_of(Uniformity(), torch.ones(2, 2), labels)[0]) == pytest.approx(0, abs=1e-6)


def test_a_weight_must_be_positive():
    with pytest.raises(ValueError, match=r"weight must be > 0 and finite, got 0"):
        Weighted(Triplet(), 0)


def test_the_registry_has_every_loss_of_these_tests():
    assert {type(loss) for loss in EVERY_LOSS.values()} == set(LOSSES.values())
