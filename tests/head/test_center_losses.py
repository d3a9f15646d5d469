"""Center loss and inter-class loss of the head against dense fp64 equations."""

import pytest
import torch
import torch.nn.functional as F

from partialfc.margins import ArcFace, CosFace, LSoftmax, Softmax
from tests.support.center_truth import truth_of
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import flat_head
from tests.support.margin_heads import BATCH, head_of, problem, step
from tests.support.reference import relative_error

CENTER, INTER_CLASS = 3.0, 2.0


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_every_margin_with_both_terms(name, rate):
    """A term that is lost, counted twice, or projected wrongly, on any kind of key and query."""
    margin = EVERY_MARGIN[name]
    weights = {"center_weight": CENTER}
    if margin.unit_centers:
        weights["inter_class_weight"] = INTER_CLASS
    head = head_of(margin, sample_rate=rate, **weights)
    embeddings, labels = problem(head)
    truth = truth_of(head, embeddings, labels)
    for value, expected in zip(step(head, embeddings, labels), truth, strict=True):
        assert relative_error(value, expected) < 2e-5


def test_the_terms_alone_move_what_they_should():
    """Center loss turns embeddings to their centers; inter-class loss parts near centers."""
    head = head_of(ArcFace(), center_weight=1.0, inter_class_weight=1.0)
    embeddings, labels = problem(head)
    head(embeddings, labels)
    cosine = F.normalize(embeddings) @ F.normalize(head.centers.detach()).T
    own = cosine[torch.arange(BATCH), labels]
    assert float(head.terms["center"]) == pytest.approx(float(1 - own.mean()), rel=1e-5)
    between = F.normalize(head.centers.detach())[labels] @ F.normalize(head.centers.detach()).T
    between[torch.arange(BATCH), labels] = -2
    nearest = float(between.amax(1).mean())
    assert float(head.terms["inter_class"]) == pytest.approx(nearest, rel=1e-5)


def test_micro_batches_with_one_sample_add_up():
    """Pulls are aligned to the rows of the step, and weighted as the micro-batch is."""
    changes = []
    for fixed in (True, False):
        head = head_of(CosFace(), sample_rate=0.3, center_weight=CENTER, inter_class_weight=2.0)
        embeddings, labels = problem(head)
        before = head.centers.detach().clone()
        total = torch.zeros_like(before, dtype=torch.float64)
        own = embeddings.clone().requires_grad_()
        if fixed:
            head.sample_step(labels)
        for piece, identities in zip(own.chunk(2), labels.chunk(2), strict=True):
            (head(piece, identities) / 2).backward()
            total += truth_of(head, piece.detach(), identities)[2] / 2 if not fixed else 0
        head.optimizer.step()
        changes.append((before - head.centers.detach(), total))
    assert relative_error(*changes[1]) < 2e-5
    assert changes[0][0].any()


def test_bf16_products_find_the_same_neighbours():
    """The nearest center is looked for in bf16; its derivative is fp32."""
    found = {}
    for compute in ("fp32", "bf16"):
        head = head_of(CosFace(), compute=compute, inter_class_weight=INTER_CLASS)
        found[compute] = step(head, *problem(head))
    for value, expected in zip(found["bf16"], found["fp32"], strict=True):
        assert relative_error(value, expected.double()) < 2e-2


def test_one_identity_has_no_neighbour():
    head = flat_head(1, 8, CosFace(), inter_class_weight=1.0)
    embeddings = torch.randn(4, 8, requires_grad=True)
    loss = head(embeddings, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    head.optimizer.step()
    assert head.terms["inter_class"] == 0
    assert head.centers.isfinite().all()


@pytest.mark.parametrize("name", ["center_weight", "inter_class_weight"])
def test_a_weight_outside_its_range_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 0 and finite, got -1"):
        flat_head(10, 4, ArcFace(), **{name: -1.0})


@pytest.mark.parametrize("margin", [Softmax(), LSoftmax()])
def test_inter_class_loss_wants_unit_centers(margin):
    with pytest.raises(ValueError, match=r"inter_class_weight = 1\.0: it turns unit centers"):
        flat_head(10, 4, margin, inter_class_weight=1.0)
