"""Rows of several identities, or of none, against every pair written out in fp64."""

import functools

import numpy as np
import pytest
import torch

from partialfc import ArcFace, CosFace, NormalizedSoftmax, PartialFC, RowSGD, Several, UniFace
from partialfc.distributed.shares import Shares
from partialfc.head.tiles import passes
from tests.support import several_truth
from tests.support.collectives import Collectives
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import flat_head
from tests.support.margin_heads import IDENTITIES, PLAIN, head_of, state_of, step, step_of_rank
from tests.support.ranks import run_on_ranks
from tests.support.reference import relative_error
from tests.support.several_truth import MOST, batch, named, weights

TAKEN = {name: margin for name, margin in EVERY_MARGIN.items() if not margin.needs_positives}
TOGETHER = {
    name: margin
    for name, margin in TAKEN.items()
    if not margin.binary and not margin.label_smoothing
}
RATES = (0.3, 1.0)


@functools.cache
def cases():
    """(margin, rate, Several) by name: every margin, and every loss with some."""
    found = {}
    for rate in RATES:
        for name, margin in TAKEN.items():
            without = "leave_out" if len(found) % 2 else "push"
            found[f"{name}, rate {rate}"] = margin, rate, Several(most=MOST, without=without)
        for name, margin in TOGETHER.items():
            loss, without = ("any", "soft")[len(found) % 2], ("push", "leave_out")[len(name) % 2]
            several = Several(most=MOST, loss=loss, without=without)
            found[f"{loss} of {name}, rate {rate}"] = margin, rate, several
    return found


def given_of(several):
    return weights() if several.loss == "soft" else None


@functools.cache
def problem_of(case):
    """Centers of a fresh head, and loss and gradients of its first step."""
    margin, rate, several = cases()[case]
    head = head_of(margin, sample_rate=rate, positives=several)
    truth = several_truth.gradients_of(
        margin,
        batch(),
        head.centers,
        named(),
        sampled=head.sampler(0, named().flatten()).rows,
        state={name: float(value) for name, value in head.margin_state().items()},
        kind=several.loss,
        without=several.without,
        given=given_of(several),
    )
    return head.centers.detach().clone(), truth


@pytest.mark.parametrize("case", cases())
def test_loss_and_gradients_are_those_of_every_pair_written_out(case):
    margin, rate, several = cases()[case]
    head = head_of(margin, sample_rate=rate, positives=several)
    _, truth = problem_of(case)
    lift = 1 / float(truth[2].norm())
    found = step(head, batch(), named(), weights=given_of(several), weight=lift)
    for value, expected in zip(found, truth, strict=True):
        assert relative_error(value, expected) < 1e-5
    pushes = bool(found[1][[2, 9, 23]].any())
    assert pushes == (several.without == "push"), "rows of no identity push, or do nothing"


def on_rank(rank, world_size, inputs, sizes):
    found = {}
    shares = None if sizes is None else Shares(sizes)
    rows = (shares or Shares((24 // world_size,) * world_size)).rows(rank)
    for case, (margin, rate, several, centers) in inputs.items():
        head = PartialFC(
            IDENTITIES, 32, margin, sample_rate=rate, optimizer=PLAIN, positives=several
        )
        given = given_of(several)
        more = {"shares": shares, "weights": None if given is None else given[rows]}
        done = step_of_rank(head, centers, batch()[rows], named()[rows], **more)
        found[case] = *done, state_of(head)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "sizes", "some"),
    [(2, None, slice(0, None, 2)), (4, None, slice(1, None, 2)), (3, (9, 7, 8), slice(0, 90, 9))],
)
def test_positives_on_different_ranks(world_size, sizes, some):
    """Every margin and loss, at one sample rate on two and at the other on four ranks; three have
    unequal shares."""
    inputs, truth = {}, {}
    for case in [*cases()][some]:
        centers, truth[case] = problem_of(case)
        inputs[case] = *cases()[case], centers
    results = run_on_ranks(world_size, on_rank, inputs, sizes)
    for case, (loss, *gradients) in truth.items():
        assert len({result[case][0] for result in results}) == 1, case
        assert results[0][case][0] == pytest.approx(float(loss), rel=1e-5), case
        assert all(result[case][3] == results[0][case][3] for result in results), case
        for index, expected in enumerate(gradients, 1):
            value = torch.from_numpy(np.concatenate([result[case][index] for result in results]))
            assert (value - expected).norm() <= 2e-5 * expected.norm() + 1e-7, case


def one_of_each(margin, identities, **settings):
    """Three steps with momentum: losses, last gradient, centers and state."""
    head = head_of(margin, sample_rate=0.3, optimizer=RowSGD(lr=0.1), **settings)
    for number in range(3):
        own = batch().roll(number, 0).requires_grad_()
        loss = head(own, identities)
        loss.backward()
        head.optimizer.step()
    return [loss.detach(), own.grad, head.centers.detach(), *head.margin_state().values()]


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_one_identity_a_row_is_the_same_bits(name):
    """[b], [b, 1], and [b, 1] of a head that takes several."""
    margin, identities = EVERY_MARGIN[name], torch.arange(24) % 20
    plain = one_of_each(margin, identities)
    every = [one_of_each(margin, identities.unsqueeze(1))]
    if name in TAKEN:
        every += [
            one_of_each(margin, identities.unsqueeze(1), positives=Several(without=without))
            for without in ("push", "leave_out")
        ]
    for other in every:
        assert all(map(torch.equal, plain, other))


@pytest.mark.parametrize("loss", ["any", "soft"])
def test_one_identity_a_row_is_the_loss_of_one(loss):
    """The probability of one alone, and a weight of 1, are what ``mean`` has; tiny losses too."""
    head = flat_head(100, 32, CosFace(additive=0), positives=Several(loss=loss))
    own = torch.nn.functional.normalize(head.centers.detach()[:8])
    given = torch.ones(8) if loss == "soft" else None
    plain = flat_head(100, 32, CosFace(additive=0))
    found = head(own, torch.arange(8), weights=given).item()
    expected = plain(own, torch.arange(8)).item()
    assert 0 < expected < 1e-8
    assert found == pytest.approx(expected, rel=1e-6)


def test_who_is_named_twice_or_further_behind_counts_once():
    """The order of a row's identities, and gaps between them, are of no matter."""
    several = Several(most=6)
    rows = [
        torch.tensor([[3, 70, 9]]),
        torch.tensor([[9, -1, 3, 3, 70, 9]]),
        torch.tensor([[-1, -1, -1, 70, 3, 9]]),
    ]
    found = []
    for identities in rows:
        head = head_of(ArcFace(), positives=several)
        found.append(step(head, batch()[:1], identities))
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            assert relative_error(value, expected.double()) < 1e-6


@pytest.mark.parametrize("loss", ["mean", "any", "soft"])
@pytest.mark.parametrize("without", ["push", "leave_out"])
def test_micro_batches_of_one_sample_are_one_batch(loss, without):
    """Also where they have unequal numbers of rows that count."""
    several = Several(most=MOST, loss=loss, without=without)
    identities = named()
    identities[13:20] = -1
    given = given_of(several)
    given = None if given is None else given + 0.01
    found = []
    for parts in (1, 2):
        head = head_of(NormalizedSoftmax(scale=16), sample_rate=0.3, positives=several)
        head.sample_step(identities)
        own, before = batch().requires_grad_(), head.centers.detach().clone()
        pieces = [None] * parts if given is None else given.chunk(parts)
        for piece, who, weight in zip(
            own.chunk(parts), identities.chunk(parts), pieces, strict=True
        ):
            (head(piece, who, weights=weight) / parts).backward()
        head.optimizer.step()
        found.append((own.grad, before - head.centers.detach()))
    for value, expected in zip(found[1], found[0], strict=True):
        assert relative_error(value, expected.double()) < 1e-5


@pytest.mark.parametrize("without", ["push", "leave_out"])
def test_the_threshold_of_uniface_follows_its_derivative(without):
    margin, several = UniFace(scale=16, bias_rate=0.01), Several(most=MOST, without=without)
    head = head_of(margin, positives=several)
    bias = torch.tensor(float(head.margin_bias), dtype=torch.float64, requires_grad=True)
    loss = several_truth.loss_of(
        margin,
        batch().double(),
        head.centers.detach().double(),
        named(),
        sampled=None,
        state={"bias": bias},
        without=without,
    )
    loss.backward()
    head(batch().requires_grad_(), named())
    expected = (bias - 0.01 * bias.grad).detach()
    assert float(head.margin_bias) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["adacos", "uniface", "adaface", "arcface smoothed"])
def test_a_batch_that_names_no_one(name):
    """All rows left out: no loss, no gradient, and no average that is no number."""
    head = head_of(EVERY_MARGIN[name], positives=Several(most=2, without="leave_out"))
    loss, pull, change = step(head, batch(), torch.full((24, 2), -1))
    assert loss == 0
    assert not pull.any()
    assert not change.any()
    assert all(value.isfinite() for value in head.margin_state().values())


def test_rows_in_host_memory_and_tiles_of_any_size_change_no_bit(monkeypatch):
    found = []
    for where, tile in (("device", None), ("host", 1)):
        if tile:
            monkeypatch.setattr(passes, "_TILE_ROWS", 16)
            monkeypatch.setitem(passes.TILE_BYTES, "cpu", tile)
        head = head_of(
            ArcFace(),
            sample_rate=0.3,
            optimizer=RowSGD(lr=0.1),
            centers_in=where,
            states_in=where,
            positives=Several(most=MOST),
        )
        for number in range(3):
            identities = named().roll(number, 0)
            head.prefetch(named().roll(number + 1, 0))
            head(batch().requires_grad_(), identities).backward()
            head.optimizer.step()
        head.optimizer.settle()
        found.append(head.centers.detach().clone())
    assert relative_error(found[1], found[0].double()) < 1e-6


def count_on_rank(rank, world_size, most):
    several = Several(most=most, loss="soft")
    head = PartialFC(100, 8, CosFace(), sample_rate=0.5, positives=several)
    for _ in range(2):  # the very first pass has more
        identities = torch.arange(4 * most).view(4, most)
        with Collectives() as one:
            head(
                torch.randn(4, 8, requires_grad=True), identities, None, torch.rand(4, most)
            ).sum().backward()
            head.optimizer.step()
    return one.seen


@pytest.mark.distributed
@pytest.mark.parametrize("most", [1, 8])
def test_collectives_are_as_many_and_as_large_as_the_docstring_says(most):
    """b = 4 rows on each of two ranks, D = 8: as for one identity, with K * B logits."""
    assert run_on_ranks(2, count_on_rank, most)[0] == [
        ("_allgather_base_", 5 * (8 * 4 + most * (8 + 4))),
        ("allreduce_", (8 + most * 8) * 4),
        ("_reduce_scatter_base_", 8 * 8 * 4),
    ]


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Numbers of rows of what the operations of a product make."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in function.__name__ and isinstance(result, torch.Tensor):
            self.seen.append((*result.shape,))
        return result


def test_products_are_those_of_one_identity_a_row():
    """Pass 1 and pass 2 multiply B rows, not K * B."""
    seen = []
    for most in (1, 8):
        head = flat_head(1000, 32, ArcFace(), sample_rate=0.5, positives=Several(most=most))
        with Sizes() as sizes:
            identities = torch.arange(24 * most).view(24, most) % 24
            head(batch().requires_grad_(), identities).backward()
            head.optimizer.step()
        seen.append(sizes.seen)
    assert seen[0] == seen[1]
    assert seen[0]


@pytest.mark.parametrize(
    ("margin", "settings", "message"),
    [
        (EVERY_MARGIN["curricularface"], {}, "CurricularFace weighs .* by its one positive"),
        (EVERY_MARGIN["mv-arc-softmax"], {}, "MVSoftmax weighs"),
        (EVERY_MARGIN["elasticface+"], {}, "ElasticFace weighs"),
        (ArcFace(), {"center_weight": 1.0}, "center_weight and inter_class_weight are for rows of"),
        (ArcFace(), {"fused": True}, "fused = true: the fused kernels cannot"),
        (UniFace(), {"positives": Several(loss="any")}, 'loss = "any" is of one softmax'),
        (
            ArcFace(label_smoothing=0.1),
            {"positives": Several(loss="soft")},
            "label_smoothing = 0.1 is shared out .* write it into the weights",
        ),
    ],
)
def test_what_looks_at_the_one_positive_is_refused(margin, settings, message):
    with pytest.raises(ValueError, match=message):
        flat_head(200, 32, margin, **{"positives": Several(most=2), **settings})


@pytest.mark.parametrize(
    ("several", "identities", "given", "message"),
    [
        (None, [[1, 2], [3, 4]], None, r"int64 \[2\].*want positives=Several\(most=K\)"),
        (Several(most=2), [[1, 2, 3], [4, 5, 6]], None, r"int64 \[2\].* or \[2, 1 to 2\]"),
        (Several(most=2), [[1, -2], [3, 4]], None, "or -1 for none, got -2 at position 0"),
        (Several(most=2), [[1, 2], [3, 200]], None, "or -1 for none, got 200 at position 1"),
        (Several(most=2), [[1, 2], [3, 4]], [[1.0, 1], [1, 1]], "weights are given"),
        (Several(most=2, loss="soft"), [[1, 2], [3, 4]], None, "weights are missing"),
        (Several(most=2, loss="soft"), [[1, 2], [3, 4]], [[1.0], [1]], r"weights must be floats"),
        (Several(most=2, loss="soft"), [[1, 2], [3, 3]], [[1.0, 1], [-1, 2]], "one in row 1 of"),
        (None, [[1], [-1]], None, r"in \[0, 200\), got -1 at position 1"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(several, identities, given, message):
    head = flat_head(200, 32, ArcFace(), positives=several)
    given = None if given is None else torch.tensor(given)
    with pytest.raises(ValueError, match=message):
        head(torch.randn(2, 32), torch.tensor(identities), weights=given)


@pytest.mark.parametrize("several", [None, Several(most=2)])
def test_a_step_of_more_identities_than_a_row_may_have_is_refused(several):
    """Neither cut nor taken for as many rows."""
    head = flat_head(200, 32, ArcFace(), sample_rate=0.5, positives=several)
    with pytest.raises(ValueError, match=r"got \[2, 3\].*want positives=Several"):
        head.sample_step(torch.tensor([[1, 2, 3], [4, 5, 6]]))


@pytest.mark.parametrize("settings", [{"most": 0}, {"loss": "all"}, {"without": "pull"}])
def test_a_setting_outside_its_range_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        Several(**settings)
    with pytest.raises(TypeError, match="positives must be a Several"):
        flat_head(200, 32, ArcFace(), positives=settings)
