"""What a teacher says, against loops over images, pairs and triplets in fp64, on 1 and 2 ranks."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from partialfc.distributed.shares import Shares
from partialfc.losses import Distillation, Lesson
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from tests.support.every_loss import problem
from tests.support.ranks import run_on_ranks

FORMS = {
    "cosine": Distillation(),
    "relational": Distillation(form="relational"),
    "margin": Distillation(form="margin", smallest_margin=0.1, largest_margin=0.9),
}


def teacher(labels, dim, seed=5):
    """Embeddings that know the identities better than those of the problem; no gradient."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(int(labels.max()) + 1, dim, generator=generator)
    return 7 * centers[labels] + 3 * torch.randn(len(labels), dim, generator=generator)


def truth(loss, embeddings, labels, taught):
    """The value and the gradient by the equations of the docstring, one term after the other."""
    own = embeddings.double().requires_grad_()
    ours, theirs = F.normalize(own), F.normalize(taught.double())
    rows = range(len(own))

    def squares(unit, a, b):
        return (unit[a] - unit[b]).square().sum()

    if loss.form == "cosine":
        found = [1 - (ours[i] * theirs[i]).sum() for i in rows]
    elif loss.form == "relational":
        found = []
        for i, j in itertools.permutations(rows, 2):
            off = (squares(ours, i, j).sqrt() - squares(theirs, i, j).sqrt()).abs()
            found.append(off**2 / 2 if off < 1 else off - 0.5)
    else:
        found = []
        for a in rows:
            same = [p for p in rows if p != a and labels[p] == labels[a]]
            other = [n for n in rows if labels[n] != labels[a]]
            if not (same and other):
                continue
            p = max(same, key=lambda p: squares(ours, a, p).item())
            n = min(other, key=lambda n: squares(ours, a, n).item())
            gap = squares(theirs, a, n) - squares(theirs, a, p)
            margin = 0.1 + 0.8 * min(max(gap.item(), 0), 2) / 2
            found.append((squares(ours, a, p) - squares(ours, a, n) + margin).relu())
    value = torch.stack(found).mean()
    value.backward()
    return value.item(), own.grad


def found_of(loss, embeddings, labels, taught, weight=1.0, factor=1.0):
    own = embeddings.clone().requires_grad_()
    losses = EmbeddingLosses({"it": Weighted(loss, weight)})
    value = losses(own, labels, lesson=Lesson(taught, factor))
    value.backward()
    return value.detach(), own.grad, losses.terms["it"]


@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_are_those_of_loops_in_fp64(form):
    embeddings, labels = problem()
    taught = teacher(labels, 8)
    expected, gradient = truth(FORMS[form], embeddings, labels, taught)
    value, ours, term = found_of(FORMS[form], embeddings, labels, taught, weight=2.0, factor=0.25)
    assert float(term) == pytest.approx(expected, rel=1e-5)
    assert float(value) == pytest.approx(0.5 * expected, rel=1e-5), "weight times its schedule"
    assert (2 * ours - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("form", ["relational", "margin"])
def test_forms_that_compare_images_take_a_teacher_of_any_length(form):
    embeddings, labels = problem()
    taught = teacher(labels, 5)
    expected, gradient = truth(FORMS[form], embeddings, labels, taught)
    value, ours, _ = found_of(FORMS[form], embeddings, labels, taught)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert (ours - gradient).norm() <= 1e-5 * gradient.norm()


def test_what_does_not_fit_is_refused():
    embeddings, labels = problem()
    with pytest.raises(ValueError, match="must be as long as the student's"):
        found_of(FORMS["cosine"], embeddings, labels, teacher(labels, 5))
    with pytest.raises(ValueError, match="needs the teacher's embeddings"):
        EmbeddingLosses({"it": Weighted(FORMS["cosine"])})(embeddings, labels)
    with pytest.raises(ValueError, match=r"smallest_margin = 0\.6: must be <= largest_margin"):
        Distillation(form="margin", smallest_margin=0.6)
    with pytest.raises(ValueError, match=r"largest_margin = 0\.7: has no effect"):
        Distillation(largest_margin=0.7)


@pytest.mark.parametrize("form", FORMS)
def test_equal_and_zero_rows_are_finite_and_nan_shows(form):
    """A distance of 0 has no direction; a bad row of the teacher must stop the run."""
    embeddings, taught, labels = (
        torch.ones(6, 4),
        torch.ones(6, 4),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    embeddings[5] = 0
    taught[4] = 0
    value, gradient, _ = found_of(FORMS[form], embeddings, labels, taught)
    assert value.isfinite()
    assert gradient.isfinite().all()
    for rows in (embeddings, taught):
        bad = rows.clone()
        bad[3, 0] = torch.nan
        pair = (bad, taught) if rows is embeddings else (torch.randn(6, 4), bad)
        assert found_of(FORMS[form], pair[0], labels, pair[1])[0].isnan()


def on_rank(rank, world_size, embeddings, labels, taught, shares=None):
    rows = (shares or Shares((len(labels) // world_size,) * world_size)).rows(rank)
    found = {}
    for form, loss in FORMS.items():
        own = embeddings[rows].clone().requires_grad_()
        losses = EmbeddingLosses({"it": Weighted(loss, 2.0)})
        value = losses(own, labels[rows], shares, Lesson(taught[rows]))
        value.backward()
        found[form] = value.item(), (own.grad / world_size).numpy()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("shares", [None, Shares((13, 11))], ids=["equal", "unequal"])
def test_ranks_do_not_change_what_is_taught(shares):
    """The teacher's rows travel with those of the student: a pair across ranks must be seen."""
    embeddings, labels = problem()
    taught = teacher(labels, 8)
    results = run_on_ranks(2, on_rank, embeddings, labels, taught, shares)
    for form, loss in FORMS.items():
        value, gradient, _ = found_of(loss, embeddings, labels, taught, weight=2.0)
        assert results[0][form][0] == results[1][form][0] == pytest.approx(float(value), rel=1e-5)
        found = torch.from_numpy(np.concatenate([result[form][1] for result in results]))
        assert (found - gradient).norm() <= 1e-5 * gradient.norm(), form
