"""Sets of identities that may have the same people, against logits [B, n] with a mask in fp64."""

import dataclasses
import functools
import importlib.util

import numpy as np
import pytest
import torch

from partialfc import ArcFace, CosFace, PartialFC, RowSGD, Sets, Several, SubCenterArcFace
from partialfc.head.options import Kernels
from partialfc.head.plan import Machine, decide
from tests.support import several_truth
from tests.support.center_truth import truth_of
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import flat_head, small_tiles
from tests.support.margin_heads import (
    BATCH,
    DIM,
    IDENTITIES,
    PLAIN,
    head_of,
    problem,
    state_of,
    step,
    step_of_rank,
)
from tests.support.ranks import run_on_ranks
from tests.support.reference import relative_error
from tests.support.several_truth import MOST, batch, named, weights

SETS = Sets(sizes=(40, 0, 110, 1, 149), may_share=((0, 2), (4, 2), (3, 4)))
"""No boundary is one of a tile or a rank's; 0 and 4 are told apart; one set has no one."""

MARGINS = {
    name: dataclasses.replace(margin, label_smoothing=0.0) if margin.label_smoothing else margin
    for name, margin in EVERY_MARGIN.items()
    if "smoothed" not in name
}
RATES = (0.3, 1.0)


def left_out(identities, sets=SETS):
    """bool [B, C], identity by identity: what the package never makes."""
    set_of = [number for number, size in enumerate(sets.sizes) for _ in range(size)]
    pairs = {frozenset(pair) for pair in sets.pairs}
    found = torch.zeros(len(identities), len(set_of), dtype=torch.bool)
    for row, its in enumerate(identities.view(len(identities), -1).tolist()):
        own = {set_of[identity] for identity in its if identity >= 0}
        for other, its_set in enumerate(set_of):
            shares = any(frozenset((its_set, one)) in pairs for one in own)
            found[row, other] = shares and its_set not in own
    return found


def weights_of(margin):
    inter_class = 2.0 if margin.unit_centers else 0.0
    return {"center_weight": 3.0, "inter_class_weight": inter_class}


@functools.cache
def problem_of(name, rate):
    head = head_of(MARGINS[name], sample_rate=rate, sets=SETS, **weights_of(MARGINS[name]))
    embeddings, labels = problem(head)
    labels[:2] = torch.tensor([150, 151])  # the one of his set, and his neighbour
    truth = truth_of(head, embeddings, labels, left_out(labels))
    return head.centers.detach().clone(), embeddings, labels, truth


@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_with_both_terms_and_a_mask(name):
    """In pass 1, and in pass 2 from the exponentials of one tile that are kept, and new ones."""
    for rate in RATES:
        _, embeddings, labels, truth = problem_of(name, rate)
        settings = {"sample_rate": rate, "sets": SETS, "keep_mib": 0.01}
        head = head_of(MARGINS[name], **settings, **weights_of(MARGINS[name]))
        with small_tiles(kernels=False):
            found = step(head, embeddings, labels)
        for value, expected in zip(found, truth, strict=True):
            assert relative_error(value, expected) < 2e-5, rate


def on_rank(rank, world_size, inputs):
    found = {}
    for case, (margin, rate, centers, embeddings, labels) in inputs.items():
        head = PartialFC(
            IDENTITIES,
            DIM,
            margin,
            sample_rate=rate,
            optimizer=PLAIN,
            sets=SETS,
            **weights_of(margin),
        )
        own = embeddings.chunk(world_size)[rank], labels.chunk(world_size)[rank]
        found[case] = *step_of_rank(head, centers, *own), state_of(head)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_margin_sharded_and_masked(world_size):
    """Sets that begin and end on any rank, or have no row of a rank."""
    cases = [(name, rate) for name in MARGINS for rate in RATES][world_size // 4 :: 5]
    inputs, truth = {}, {}
    for name, rate in cases:
        *problem, truth[name, rate] = problem_of(name, rate)
        inputs[name, rate] = MARGINS[name], rate, *problem
    results = run_on_ranks(world_size, on_rank, inputs)
    for case, (loss, *gradients) in truth.items():
        assert len({result[case][0] for result in results}) == 1, case
        assert results[0][case][0] == pytest.approx(float(loss), rel=1e-5), case
        for index, expected in enumerate(gradients, 1):
            value = torch.from_numpy(np.concatenate([result[case][index] for result in results]))
            assert relative_error(value, expected) < 2e-5, case


@pytest.mark.parametrize("kind", ["mean", "any", "soft"])
@pytest.mark.parametrize("rate", RATES)
def test_rows_of_identities_in_several_sets_and_in_none(kind, rate):
    """A row leaves out none of its own sets; a row of no identity leaves out nothing."""
    several = Several(most=MOST, loss=kind)
    head = head_of(CosFace(scale=16), sample_rate=rate, positives=several, sets=SETS)
    given = weights() if kind == "soft" else None
    sampled = head.sampler(0, named().flatten()).rows
    identities = named()
    if given is not None:  # a weight of 0 is as no identity
        identities = identities.masked_fill(~(given > 0), -1)
    mask = left_out(identities)
    truth = several_truth.gradients_of(
        head.margin,
        batch(),
        head.centers,
        named(),
        sampled=sampled,
        state={},
        kind=kind,
        given=given,
        left_out=mask if sampled is None else mask[:, sampled],
    )
    found = step(head, batch(), named(), weights=given)
    for value, expected in zip(found, truth, strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("fixed", [True, False])
def test_micro_batches_mask_the_rows_of_the_whole_step(fixed):
    """Pass 2 goes over the rows that any of them sampled, where a set has other columns."""
    head = head_of(SubCenterArcFace(scale=16, sub_centers=2), sample_rate=0.3, sets=SETS)
    embeddings, labels = problem(head)
    before = head.centers.detach().clone()
    expected = torch.zeros_like(before, dtype=torch.float64)
    if fixed:
        head.sample_step(labels)
    for piece, identities in zip(embeddings.chunk(2), labels.chunk(2), strict=True):
        own = piece.clone().requires_grad_()
        (head(own, identities) / 2).backward()
        if not fixed:
            expected += truth_of(head, piece, identities, left_out(identities))[2] / 2
    head.optimizer.step()
    change = before - head.centers.detach()
    assert change.isfinite().all()
    if not fixed:
        assert relative_error(change, expected) < 2e-5


@pytest.mark.parametrize("name", ["curricularface", "mv-arc-softmax", "arcface", "uniface"])
def test_sets_of_other_people_change_no_bit(name):
    """One set, and sets that have no one in common, are as no sets."""
    found = []
    for sets in (None, Sets(sizes=(300,)), Sets(sizes=(100, 200), may_share=())):
        head = head_of(MARGINS[name], sample_rate=0.3, sets=sets, optimizer=RowSGD(lr=0.1))
        embeddings, labels = problem(head)
        for _ in range(2):
            own = embeddings.clone().requires_grad_()
            head(own, labels).backward()
            head.optimizer.step()
        found.append((own.grad, head.centers.detach()))
    for gradient, centers in found[1:]:
        assert torch.equal(gradient, found[0][0])
        assert torch.equal(centers, found[0][1])


def by_kernels(device, name):
    with small_tiles(kernels=True):
        head = head_of(MARGINS[name], sample_rate=0.3, sets=SETS, device=device)
        assert head.plan.path == "triton"
        head.centers.copy_(problem_of(name, 0.3)[0])
        _, embeddings, labels, _ = problem_of(name, 0.3)
        found = step(head, embeddings.to(device), labels.to(device))
        return [value.cpu().numpy() for value in found]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "name",
    [
        "curricularface",
        pytest.param("arcface", marks=pytest.mark.slow),
        pytest.param("sub-center arcface", marks=pytest.mark.slow),
    ],
)
def test_triton_steps_mask_as_torch_does(launch, name):
    found = launch.run(by_kernels, launch.device, name)
    _, embeddings, labels, _ = problem_of(name, 0.3)
    expected = step(head_of(MARGINS[name], sample_rate=0.3, sets=SETS), embeddings, labels)
    for value, plain in zip(found, expected, strict=True):
        assert relative_error(torch.from_numpy(value), plain.double()) < 1e-5


@pytest.mark.parametrize("name", ["arcface s 128", "curricularface", "mv-arc-softmax", "adacos"])
def test_a_row_that_is_told_from_no_one(name):
    """The one of his set: no loss, no gradient, nothing that is no number."""
    head = head_of(MARGINS[name], sets=Sets(sizes=(1, 299)))
    loss, pull, change = step(head, batch()[:2], torch.zeros(2, dtype=torch.int64))
    assert loss == 0
    assert not pull.any()
    assert not change.any()
    assert all(value.isfinite() for value in head.margin_state().values())


class Masks(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor of bools that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_mask_has_a_row_for_each_center():
    head = head_of(ArcFace(), sets=SETS)
    embeddings, labels = problem(head)
    with Masks() as masks:
        head(embeddings.requires_grad_(), labels).backward()
        head.optimizer.step()
    assert 0 < masks.largest <= BATCH * len(SETS.sizes) < BATCH * IDENTITIES


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": Sets(sizes=(100, 99))}, r"\(100, 99\) are 199 .* num_identities is 200"),
        ({"margin": ArcFace(label_smoothing=0.1)}, "label_smoothing = 0.1 .* Set it to 0"),
        ({"fused": True}, "fused = true: the fused kernels cannot"),
    ],
)
def test_what_does_not_go_with_sets_is_refused(settings, message):
    margin = settings.pop("margin", ArcFace())
    with pytest.raises(ValueError, match=message):
        flat_head(200, 32, margin, **{"sets": Sets(sizes=(100, 100)), **settings})


def test_fused_kernels_know_no_sets():
    machine = Machine("cuda", has_kernels=True, capability=(9, 0))
    asked = {"dim": 512, "unit_centers": True, "centers_per_identity": 1, "binary": False}
    for sets, path in ((False, "fused"), (True, "triton")):
        plan = decide(machine, **asked, sgd=True, compute="bf16", fused=True, sets=sets)
        assert plan.path == path
    with pytest.raises(ValueError, match="sets leave some out"):
        plan.refuse(fused=Kernels(fused=True).fused)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ()}, "one integer >= 0 for each set"),
        ({"sizes": (3, -1)}, "one integer >= 0 for each set"),
        ({"sizes": (3, 4), "may_share": ((0, 2),)}, r"numbered from 0 to 1, got \(0, 2\)"),
        ({"sizes": (3, 4), "may_share": ((1, 1),)}, r"two different sets"),
    ],
)
def test_sets_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sets(**settings)
