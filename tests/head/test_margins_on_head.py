"""Every margin on the head, on one rank, against the dense fp64 equations."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses

from partialfc import RowSGD
from partialfc.head.tiles import passes
from partialfc.margins import (
    ArcFace,
    CombinedMargin,
    ElasticFace,
    LSoftmax,
    SphereFace,
    SubCenterArcFace,
    UniFace,
)
from tests.support import loss_truth
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import flat_head
from tests.support.margin_heads import DIM, IDENTITIES, PLAIN, head_of, problem, settings_of, step
from tests.support.reference import relative_error


@pytest.mark.parametrize("angles", ["random", "0", "pi/2", "pi"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_loss_and_gradients_equal_the_fp64_equations(name, rate, angles):
    head = head_of(EVERY_MARGIN[name], sample_rate=rate)
    embeddings, labels = problem(head, angles)
    truth = loss_truth.gradients_of(
        head.margin, embeddings, head.centers, labels, **settings_of(head, labels)
    )
    found = step(head, embeddings, labels, weight=1 / float(truth[2].norm()))
    for value, expected in zip(found, truth, strict=True):
        limit = {"random": 1e-5, "pi/2": 1e-5, "0": 5e-3, "pi": 1e-3}[angles]
        assert relative_error(value, expected) < limit


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_bf16_products_are_no_worse_than_plain_bf16_code(name):
    """Plain: fp32 parameters and softmax, the product's operands and result in bf16.

    Which error is larger depends on the numbers, e.g. on which of two near sub-centers wins.
    """
    head = head_of(EVERY_MARGIN[name], compute="bf16")
    embeddings, labels = problem(head)
    settings = settings_of(head, labels)
    truth = loss_truth.gradients_of(head.margin, embeddings, head.centers, labels, **settings)
    settings |= {"dtype": torch.float32, "product": loss_truth.bf16_product}
    plain = loss_truth.gradients_of(head.margin, embeddings, head.centers, labels, **settings)
    found = step(head, embeddings, labels)
    for value, rounded_value, expected in zip(found, plain, truth, strict=True):
        limit = max(2 * relative_error(rounded_value, expected), 1e-3)
        assert relative_error(value, expected) <= limit


@pytest.mark.parametrize("name", EVERY_MARGIN)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_kept_exponentials_change_no_result(name, compute, monkeypatch):
    """All tiles kept, one, or none: the same to the rounding of a row maximum."""
    monkeypatch.setitem(passes.TILE_BYTES, "cpu", 1)
    changes = []
    for budget in (0, 10_000, 1 << 30):
        head = head_of(EVERY_MARGIN[name], compute=compute, keep_mib=budget / 2**20)
        changes.append(step(head, *problem(head))[2])
    assert changes[0].any()
    for other in changes[1:]:
        assert relative_error(other, changes[0].double()) < (1e-6 if compute == "fp32" else 4e-3)


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_micro_batches_add_up(name):
    """Two halves with one sample are the whole batch, where the margin knows no other row."""
    margin = EVERY_MARGIN[name]
    if head_of(margin).margin_state() or isinstance(margin, ElasticFace):
        pytest.skip("this margin depends on the batch")
    changes = []
    for parts in (1, 2):
        head = head_of(margin, sample_rate=0.5)
        embeddings, labels = problem(head)
        before = head.centers.detach().clone()
        head.sample_step(labels)
        own = embeddings.clone().requires_grad_()
        for piece, identities in zip(own.chunk(parts), labels.chunk(parts), strict=True):
            (head(piece, identities) / parts).backward()
        head.optimizer.step()
        changes.append((own.grad, before - head.centers.detach()))
    for value, expected in zip(changes[1], changes[0], strict=True):
        assert relative_error(value, expected.double()) < 1e-5


@pytest.mark.parametrize(
    "name", ["arcface smoothed", "softmax smoothed", "arcface s 128", "sub-center arcface s 64"]
)
def test_micro_batches_with_samples_of_their_own_add_up(name):
    """Each moves its own rows only, by label smoothing's share too."""
    heads = [head_of(EVERY_MARGIN[name], sample_rate=0.1) for _ in range(3)]
    embeddings, labels = problem(heads[0])
    pieces = list(zip(embeddings.chunk(2), labels.chunk(2), strict=True))
    alone = [step(head, *piece)[2] for head, piece in zip(heads, pieces, strict=False)]
    assert (alone[0].any(1) ^ alone[1].any(1)).any(), "or the samples are one"
    before = heads[2].centers.detach().clone()
    for piece in pieces:
        heads[2](piece[0].requires_grad_(), piece[1]).backward()
    heads[2].optimizer.step()
    together = before - heads[2].centers.detach()
    assert relative_error(together, sum(alone).double()) < 1e-5


@pytest.mark.parametrize(
    ("general", "special"),
    [
        (CombinedMargin(multiplicative=1, angular=0.5, additive=0), "arcface exact"),
        (CombinedMargin(multiplicative=1, angular=0, additive=0.35), "cosface"),
        (
            CombinedMargin(multiplicative=2, angular=0, additive=0, past_pi="fold"),
            "f-norm sphereface",
        ),
        (CombinedMargin(multiplicative=1, angular=0, additive=0), "normalized softmax"),
        (EVERY_MARGIN["elasticface"], "arcface exact"),
        (EVERY_MARGIN["mv-arc-softmax"], "arcface exact"),
        (EVERY_MARGIN["sub-center arcface"], "arcface exact"),
        (EVERY_MARGIN["l-softmax"], "softmax"),
        (EVERY_MARGIN["sphereface"], "modified softmax"),
        (EVERY_MARGIN["magface"], "arcface exact"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_margin_has_another_as_its_limit(general, special):
    """E.g. MV-Softmax with weight 1, ElasticFace with deviation 0: the very same numbers."""
    common = {"scale": 30.0, "inter_class_filter": None, "label_smoothing": 0.0, "angular": 0.5}
    limits = {
        "ElasticFace": {"deviation": 0.0},
        "MVSoftmax": {"weight": 1.0},
        "SubCenterArcFace": {"sub_centers": 1},
        "LSoftmax": {"multiplicative": 1, "scale": 1.0},
        "SphereFace": {"multiplicative": 1, "scale": 1.0},
        "MagFace": {"smallest_angular": 0.5, "largest_angular": 0.5, "norm_weight": 0.0},
    }

    def at(margin):
        own = limits.get(type(margin).__name__, {})
        names = [field.name for field in dataclasses.fields(margin)]
        if isinstance(margin, CombinedMargin):
            own = {"angular": margin.angular}
        if not (margin.unit_embeddings and margin.unit_centers):
            own = {**own, "scale": 1.0}
        return type(margin)(
            **{name: {**common, **own}.get(name, getattr(margin, name)) for name in names}
        )

    ends, directions = [], torch.randn(IDENTITIES, DIM, generator=torch.Generator().manual_seed(3))
    for margin in (at(general), at(EVERY_MARGIN[special])):
        head = head_of(margin)
        with torch.no_grad():
            head.centers[:, :DIM] = directions
            head.centers[:, DIM:] = 0  # the bias, where there is one
        found = step(head, *problem(head))
        ends.append([value[..., :DIM] if value.ndim else value for value in found])
    for value, expected in zip(*ends, strict=True):
        if isinstance(general, type(EVERY_MARGIN["l-softmax"])) and value.ndim:
            value, expected = value[..., :DIM], expected[..., :DIM]
        assert relative_error(value, expected.double()) < 2e-5


@pytest.mark.parametrize("name", ["adaface", "curricularface", "adacos"])
def test_a_state_moves_with_finite_training_batches_only(name):
    head = head_of(EVERY_MARGIN[name])
    embeddings, labels = problem(head)
    before = copy.deepcopy(head.margin_state())
    with torch.no_grad():
        head(embeddings, labels)
    broken = embeddings.clone()
    broken[3] = torch.nan
    head(broken.requires_grad_(), labels).backward()
    head.optimizer.step()
    assert head.margin_state() == before, "evaluation or a skipped step moved it"
    step(head, embeddings, labels)
    assert head.margin_state() != before
    other = head_of(EVERY_MARGIN[name])
    other.load_shared_state(head.shared_state())
    assert other.margin_state() == head.margin_state()


def test_adacos_follows_its_equation():
    head = head_of(EVERY_MARGIN["adacos"])
    embeddings, labels = problem(head, "0")
    scale = float(head.margin_state()["scale"])
    cosine = F.normalize(embeddings).double() @ F.normalize(head.centers.detach()).double().T
    own = F.one_hot(labels, IDENTITIES).bool()
    total = (scale * cosine).exp().masked_fill(own, 0).sum(1).mean()
    median = cosine[own].clamp(-1, 1).acos().median().clamp(max=torch.pi / 4)
    step(head, embeddings, labels)
    assert float(head.margin_state()["scale"]) == pytest.approx(
        float(total.log() / median.cos()), rel=1e-5
    )


PML = {
    "arcface": (
        CombinedMargin(scale=30, angular=math.radians(40), additive=0, past_pi="drop"),
        lambda size: losses.ArcFaceLoss(*size, margin=40, scale=30),
    ),
    "cosface": (
        EVERY_MARGIN["cosface"],
        lambda size: losses.CosFaceLoss(*size, margin=0.35, scale=30),
    ),
    "normalized softmax": (
        EVERY_MARGIN["normalized softmax"],
        lambda size: losses.NormalizedSoftmaxLoss(*size, temperature=1 / 30),
    ),
    "sphereface": (
        SphereFace(annealing=0, annealing_end=0),
        lambda size: losses.SphereFaceLoss(*size, margin=4),
    ),
    "l-softmax": (
        LSoftmax(multiplicative=3, annealing=0, annealing_end=0),
        lambda size: losses.LargeMarginSoftmaxLoss(*size, margin=3),
    ),
    "sub-center arcface": (
        SubCenterArcFace(scale=30, gradient="exact", angular=0.3),
        lambda size: losses.SubCenterArcFaceLoss(
            num_classes=size[0], embedding_size=size[1], margin=math.degrees(0.3), scale=30
        ),
    ),
}


@pytest.mark.parametrize("name", PML)
def test_pytorch_metric_learning_has_the_same_loss_and_gradients(name):
    """Where that library has the loss, ours is equal to it."""
    margin, other_of = PML[name]
    head = head_of(margin)
    embeddings, labels = problem(head)
    other = other_of((IDENTITIES, DIM))
    other.W.data = head.centers.detach().double().T.clone()
    own = embeddings.double().requires_grad_()
    expected = other(own, labels)
    expected.backward()
    found = step(head, embeddings, labels)
    truth = expected.detach(), own.grad, other.W.grad.T
    for value, wanted in zip(found, truth, strict=True):
        assert relative_error(value, wanted) < 1e-5


@pytest.mark.parametrize("scale", [64, 128, 256])
def test_a_filtered_negative_does_not_hide_the_others(scale):
    """Its cosine is the largest and its logit is 0: the row maximum is that of the rest."""
    head = flat_head(8, 8, ArcFace(scale=scale, inter_class_filter=0.5), optimizer=PLAIN)
    head.centers.data.copy_(torch.eye(8))
    embeddings, labels = torch.tensor([[0.2, 0.98, 0, 0, 0, 0, 0, 0]]), torch.tensor([3])
    truth = loss_truth.gradients_of(head.margin, embeddings, head.centers, labels)
    for value, expected in zip(step(head, embeddings, labels), truth, strict=True):
        assert relative_error(value, expected) < 1e-5
    assert truth[0] > 1


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_a_loss_without_gradient_is_the_same_in_every_mode(name):
    head = head_of(EVERY_MARGIN[name])
    embeddings, labels = problem(head)
    with torch.inference_mode():
        inference = head(embeddings, labels)
    with torch.no_grad():
        assert torch.equal(head(embeddings, labels), inference)
    if not head.margin_state():  # a training step moves it first
        assert relative_error(step(head, embeddings, labels)[0], inference.double()) < 1e-6


def test_fp16_centers_are_refused_where_their_length_matters():
    """Their scale is kept apart, so that a tile of them is of any length."""
    with pytest.raises(ValueError, match="Softmax looks at its length"):
        head_of(EVERY_MARGIN["softmax"], center_format="fp16")


@pytest.mark.parametrize("name", ["softmax", "l-softmax", "sphereface", "sub-center arcface"])
def test_bf16_centers_train(name):
    head = head_of(EVERY_MARGIN[name], center_format="bf16", optimizer=RowSGD(lr=0.1))
    embeddings, labels = problem(head)
    losses = [float(step(head, embeddings, labels)[0]) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_the_threshold_of_uniface_follows_its_derivative():
    """By its rate, over all sampled negatives, and never by more than 1 a step."""
    head = head_of(UniFace(scale=16, additive=0.1, bias_rate=0.01), sample_rate=0.3)
    embeddings, labels = problem(head)
    settings = settings_of(head, labels)
    bias = torch.tensor(settings["state"]["bias"], dtype=torch.float64, requires_grad=True)
    settings["state"] = {"bias": bias}
    centers = head.centers.detach().double()
    loss_truth.loss_of(head.margin, embeddings.double(), centers, labels, **settings).backward()
    step(head, embeddings, labels)
    moved = float(head.margin_state()["bias"]) - float(bias.detach())
    assert moved == pytest.approx(-0.01 * float(bias.grad), rel=1e-3)
    fast = head_of(UniFace(scale=16, bias_rate=100), sample_rate=0.3)
    before = float(fast.margin_state()["bias"])
    step(fast, embeddings, labels)
    assert abs(float(fast.margin_state()["bias"]) - before) == pytest.approx(1)
