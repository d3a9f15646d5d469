"""Several copies of the class centers, each over some of the ranks: equal to one copy over all."""

import numpy as np
import pytest
import torch

from partialfc import (
    ArcFace,
    CosFace,
    Nearest,
    PartialFC,
    RowAdagrad,
    RowAdamW,
    RowSGD,
    Sets,
    Several,
)
from partialfc.distributed.shares import Shares
from partialfc.head import partial_fc
from tests.support import loss_truth, reference
from tests.support.collectives import Collectives
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import flat_head, small_tiles
from tests.support.margin_heads import (
    IDENTITIES,
    PLAIN,
    head_of,
    problem,
    settings_of,
    state_of,
    step_of_rank,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

RATES = (0.3, 1.0)


def losses_on_rank(rank, world_size, ranks_per_copy, inputs):
    found = {}
    for case, (margin, rate, centers, embeddings, labels) in inputs.items():
        head = PartialFC(
            IDENTITIES,
            embeddings.shape[1],
            margin,
            sample_rate=rate,
            optimizer=PLAIN,
            ranks_per_copy=ranks_per_copy,
        )
        own = embeddings.chunk(world_size)[rank], labels.chunk(world_size)[rank]
        found[case] = *step_of_rank(head, centers, *own), state_of(head)
    return found


@pytest.mark.parametrize("ranks_per_copy", [2, 1])
def test_every_margin_in_copies_against_the_equations(ranks_per_copy):
    """Loss, both gradients and what margins remember on 4 ranks: those of one undivided head."""
    inputs, truth, states = {}, {}, {}
    for name, margin in EVERY_MARGIN.items():
        for rate in RATES:
            head = head_of(margin, sample_rate=rate)
            embeddings, labels = problem(head)
            case = f"{name}, rate {rate}"
            centers = head.centers.detach().clone()
            inputs[case] = margin, rate, centers, embeddings, labels
            settings = settings_of(head, labels)
            truth[case] = loss_truth.gradients_of(margin, embeddings, centers, labels, **settings)
            head(embeddings.clone().requires_grad_(), labels).backward()
            states[case] = state_of(head)
    results = run_on_ranks(4, losses_on_rank, ranks_per_copy, inputs)
    for case, (loss, embedding_gradient, center_gradient) in truth.items():
        assert len({result[case][0] for result in results}) == 1, case
        assert results[0][case][0] == pytest.approx(float(loss), rel=1e-5), case
        for result in results:
            assert result[case][3] == pytest.approx(states[case], rel=1e-5), case
        value = torch.from_numpy(np.concatenate([result[case][1] for result in results]))
        bound = 2e-5 * embedding_gradient.norm() + 1e-7
        assert (value - embedding_gradient).norm() <= bound, case
        changes = [result[case][2] for result in results]
        copies = [changes[i : i + ranks_per_copy] for i in range(0, 4, ranks_per_copy)]
        for copy in copies:
            assert all(map(np.array_equal, copy, copies[0])), f"{case}: all copies are one"
            value = torch.from_numpy(np.concatenate(copy))
            bound = 2e-5 * center_gradient.norm() + 1e-7
            assert (value - center_gradient).norm() <= bound, case


C, D, B = 400, 16, 24
"""Identities, elements, images of a step."""

CASES = {
    "sgd": {},
    "all centers": {"sample_rate": 1.0},
    "adamw": {"optimizer": RowAdamW(lr=1e-2)},
    "adagrad": {"optimizer": RowAdagrad(lr=0.1)},
    "unsampled rows stay": {"optimizer": RowSGD(lr=0.3, unsampled="stay")},
    "fp16 centers, int8 momentum": {
        "optimizer": RowSGD(lr=0.3, momentum_format="int8"),
        "center_format": "fp16",
        "keep_mib": 0,
    },
    "host memory": {"centers_in": "host", "states_in": "host"},
    "weighted": {"negatives": "weighted"},
    "nearest": {"negatives": Nearest(neighbours=4, every_steps=3)},
    "center losses": {"center_weight": 0.5, "inter_class_weight": 0.5},
    "sets": {"sets": Sets(sizes=(150, 150, 100))},
    "several, some of none": {"positives": Several(most=3, without="leave_out")},
    "several, soft": {"positives": Several(most=3, loss="soft")},
}
MARGIN_OF_CASE = {"all centers": EVERY_MARGIN["arcface s 128"], "adamw": EVERY_MARGIN["adaface"]}


def images_of(case, step):
    """Inputs, identities and weights of a step, of all ranks."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(B, 12, generator=generator)
    most = 3 if case.startswith("several") else 1
    labels = torch.randint(0, C // 4, (B, most), generator=generator)
    if case.startswith("several"):
        labels[torch.rand(B, most, generator=generator) < 0.4] = -1
        labels[: B // 4] = -1  # so that copies have not as many rows that count
    weights = torch.rand(B, most, generator=generator) if "soft" in case else None
    return inputs, labels if most > 1 else labels[:, 0], weights


def train_on_rank(rank, world_size, ranks_per_copy, parts=1, shares=None):
    """Seven steps of each case; the second has a loss that is not finite."""
    found = {}
    for case, settings in CASES.items():
        torch.manual_seed(0)
        backbone = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(12, D))
        settings = {"sample_rate": 0.2, "optimizer": RowSGD(lr=0.3), **settings}
        margin = MARGIN_OF_CASE.get(case, EVERY_MARGIN["arcface"])
        head = flat_head(C, D, margin, ranks_per_copy=ranks_per_copy, **settings)
        of_ranks = shares or Shares.of(B, world_size, parts)
        mine, losses = of_ranks.rows(rank), []
        for step in range(7):
            inputs, labels, weights = images_of(case, step)
            own = [inputs[mine], labels[mine], None if weights is None else weights[mine]]
            if step == 1 and rank == 0:
                own[0] = own[0] * torch.nan
            if parts > 1:
                head.sample_step(own[1], of_ranks)
            backbone.zero_grad()
            chunks = [(None,) * parts if one is None else one.chunk(parts) for one in own]
            for x, y, w in zip(*chunks, strict=True):
                loss = head(backbone(x), y, of_ranks.of_each(parts), w)
                (loss / parts).backward()
                losses.append(loss.item())
            if step != 1:
                with torch.no_grad():
                    for parameter in backbone.parameters():
                        parameter -= 0.05 * parameter.grad
            head.optimizer.step()
        state = head.state_dict() | head.optimizer.states()
        centers = {name: value.numpy().copy() for name, value in state.items() if name[0] != "_"}
        found[case] = losses, head.terms, backbone.module.weight.detach().numpy(), centers
    return found


def assert_same_training(one, several, ranks_per_copy, tolerance=2e-5):
    """What ranks of one copy leave and what those of several do."""
    for case in CASES:
        coarse = "fp16" in case
        bound = 2e-2 if coarse else tolerance
        for result in several:
            np.testing.assert_allclose(
                result[case][0], one[0][case][0], rtol=bound, atol=bound, err_msg=case
            )
            same = np.array_equal(result[case][0], several[0][case][0], equal_nan=True)
            assert same, f"{case}: the loss is one"
            for name, term in result[case][1].items():
                assert float(term) == pytest.approx(float(one[0][case][1][name]), rel=1e-3), case
            difference = np.linalg.norm(result[case][2] - one[0][case][2])
            assert difference <= bound * np.linalg.norm(one[0][case][2]), case
        for number, result in enumerate(several):
            twin = several[number % ranks_per_copy]
            for name, value in result[case][3].items():
                assert np.array_equal(value, twin[case][3][name]), f"{case}: {name} of copies"
        if coarse:
            continue
        for name in one[0][case][3]:
            joined = np.concatenate if one[0][case][3][name].ndim else np.mean  # or of the margin
            expected = joined([result[case][3][name] for result in one])
            value = joined([result[case][3][name] for result in several[:ranks_per_copy]])
            difference = np.linalg.norm((value - expected).astype(np.float64))
            assert difference <= 10 * bound * np.linalg.norm(expected), f"{case}: {name}"


@pytest.mark.slow
def test_two_copies_on_four_ranks_train_as_one_copy_does():
    """Losses, backbone, centers and their states to rounding; the copies to the last bit."""
    one = run_on_ranks(4, train_on_rank, None)
    assert np.isnan(one[0]["sgd"][0][1])
    assert np.isfinite(one[0]["sgd"][0][2:]).all()
    assert_same_training(one, run_on_ranks(4, train_on_rank, 2), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "shares"), [(3, None), (1, Shares((5, 7, 4, 8)))], ids=str)
def test_micro_batches_and_unequal_shares_of_copies(parts, shares):
    """Rows of a copy may differ from rank to rank; those of two copies are as many."""
    one = run_on_ranks(4, train_on_rank, None, parts, shares)
    assert_same_training(one, run_on_ranks(4, train_on_rank, 2, parts, shares), 2)


BF16_MARGINS = (ArcFace(), CosFace(scale=30), ArcFace(scale=16))
SEEDS = range(8)


def problem_of(seed):
    """Embeddings of a batch, and their identities of 1000."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(24, 32, generator=generator)
    return embeddings, torch.randint(0, 1000, (24,), generator=generator)


def bf16_step_on_rank(rank, world_size, ranks_per_copy):
    """Of each margin and seed: loss, gradient of the own rows, first of the own centers, these,
    and their gradient."""
    found = []
    for margin in BF16_MARGINS:
        for seed in SEEDS:
            settings = {"optimizer": PLAIN, "compute": "bf16", "ranks_per_copy": ranks_per_copy}
            head = flat_head(1000, 32, margin, **settings)
            embeddings, labels = (part.chunk(world_size)[rank] for part in problem_of(seed))
            before, own = head.centers.detach().clone(), embeddings.clone().requires_grad_()
            loss = head(own, labels)
            loss.backward()
            head.optimizer.step()
            change = (before - head.centers.detach()).numpy()
            rows = head.owned.start, before.numpy(), change
            found.append((loss.item(), own.grad.numpy() / world_size, *rows))
    return found


@pytest.mark.slow
def test_a_bf16_step_of_copies_is_as_near_to_fp64_as_one_copy_and_plain_bf16_code():
    """Over steps, bf16 parts from itself: one copy on 2 ranks from one on 4 by 5 % of the
    backbone in seven steps of a large rate, and copies do no more."""
    layouts = {size: run_on_ranks(4, bf16_step_on_rank, size) for size in (None, 2)}
    number = 0
    for margin in BF16_MARGINS:
        errors = {name: [] for name in (*layouts, "plain")}
        for seed in SEEDS:
            embeddings, labels = problem_of(seed)
            found = {}
            for name, results in layouts.items():
                parts = [result[number] for result in results]
                places = {part[2]: part[3:] for part in parts}
                centers, change = (
                    torch.from_numpy(np.concatenate([places[first][i] for first in sorted(places)]))
                    for i in (0, 1)
                )
                gradient = torch.from_numpy(np.concatenate([part[1] for part in parts]))
                found[name] = torch.tensor(parts[0][0]), gradient, change
            logit = reference.positive_logit(margin)
            given = embeddings, centers, labels
            truth = reference.gradients_of(*given, logit, scale=margin.scale)
            found["plain"] = reference.plain_gradients(*given, margin, torch.bfloat16)
            for name, values in found.items():
                errors[name].append([*map(reference.relative_error, values, truth)])
            number += 1
        means = {name: torch.tensor(each).mean(0) for name, each in errors.items()}
        assert (means[2] <= 1.02 * means[None]).all(), (margin, means)
        # A loss is one number a seed: that of 8 seeds says nothing to 2 %.
        assert (means[2][1:] <= 1.02 * means["plain"][1:]).all(), (margin, means)


def count_on_rank(rank, world_size, margin, tile_rows):
    with small_tiles(kernels=False, rows=tile_rows):
        head = PartialFC(400, 8, margin, sample_rate=0.5, ranks_per_copy=2)
        for _ in range(2):  # the very first pass has more
            with Collectives() as forward:
                head(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
            with Collectives() as update:
                head.optimizer.step()
        tiles = len(head.sampler(0, torch.arange(4)).rows) / tile_rows
    return forward.seen, update.seen, tiles


def test_collectives_of_copies_are_as_many_and_as_large_as_the_docstrings_say(monkeypatch):
    """b = 4 rows on each of 4 ranks, two a copy, D = 8: embeddings stay among the two ranks."""
    forward, update, tiles = run_on_ranks(4, count_on_rank, EVERY_MARGIN["cosface"], 128)[0]
    gather, others = ("_allgather_base_", 5 * (8 * 4 + 8)), ("_allgather_base_", 9 * 8)
    products = ("_allgather_base_", 8 * 4)  # of all rows, for the margin
    sums, loss = ("allreduce_", 2 * 8 * 4), ("allreduce_", 4)
    scatter = ("_reduce_scatter_base_", 8 * 8 * 4)
    assert forward == [gather, others, products, sums, loss, scatter]
    assert update[0] == ("allreduce_", 4), "whether the step counts"
    assert len(update) == 1 - (-tiles // 1)
    assert {kind for kind, _ in update} == {"allreduce_"}
    learned = run_on_ranks(4, count_on_rank, EVERY_MARGIN["adacos"], 128)[0][0]
    assert len(learned) == len(forward) + 1


def verdict_on_rank(rank, world_size):
    """One rank alone is told anything, that the step does not count."""
    head = PartialFC(50, 8, EVERY_MARGIN["arcface"], ranks_per_copy=2)
    before = head.centers.detach().clone()
    head(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()
    if rank == 3:
        head.optimizer.found_inf = torch.tensor(1.0)
    head.optimizer.step()
    return torch.equal(head.centers, before)


def test_a_verdict_of_one_rank_holds_for_the_others_of_its_rows():
    """Or they would wait for its tiles for ever."""
    assert run_on_ranks(4, verdict_on_rank) == [False, True, False, True]


def refuse_on_rank(rank, world_size):
    margin, said = EVERY_MARGIN["arcface"], []

    def heard(make):
        try:
            make()
        except ValueError as error:
            said.append(str(error))

    heard(lambda: PartialFC(50, 8, margin, ranks_per_copy=3))
    heard(lambda: PartialFC(50, 8, margin, ranks_per_copy=0))
    heard(lambda: PartialFC(50, 8, margin, ranks_per_copy=2, holders=range(1)))
    head = PartialFC(50, 8, margin, ranks_per_copy=2)
    for rows, shares in (
        (4 + (rank == 3), None),  # one copy finds it out, and all refuse
        (4 + (rank > 1), None),  # no copy does alone
        (5 - (rank > 1), Shares((5, 5, 4, 4))),
    ):
        heard(lambda: head(torch.randn(rows, 8), torch.arange(rows), shares))  # noqa: B023
    heard(lambda: head(torch.randn(4, 8), torch.arange(4) + 50 * (rank == 2)))
    return said


def test_what_copies_cannot_be_is_refused_by_every_rank():
    for said in run_on_ranks(4, refuse_on_rank):
        assert [line.split(":")[0] for line in said[:2]] == [
            "ranks_per_copy = 3",
            "ranks_per_copy = 0",
        ]
        assert "holders" in said[2]
        assert all("same size on every rank" in line for line in said[3:5]), said
        assert "they have 8 to 10" in said[5]
        assert "identities must be in [0, 50)" in said[6]
        assert len(said) == 7


def broadcast_on_rank(rank, world_size):
    """The ranks of the second copy were given the same rows."""
    head = PartialFC(50, 8, EVERY_MARGIN["arcface"], ranks_per_copy=2)
    if rank > 1:
        torch.nn.init.normal_(head.centers, generator=torch.Generator().manual_seed(7))
    try:
        head(torch.randn(4, 8), torch.arange(4))
    except ValueError as error:
        return str(error)
    return ""


def test_rows_that_were_broadcast_in_one_copy_are_refused_by_all():
    """Or the others would wait for it in their next collective, until the timeout."""
    for said in run_on_ranks(4, broadcast_on_rank):
        assert said.startswith("centers: those of rank 3 are a copy of those of rank 2"), said


def refuse_of_a_gpu_on_rank(rank, world_size):
    """What a head says where it has kernels, and a device that overlaps."""
    fused, said = {"fused": True, "compute": "bf16"}, []
    with small_tiles(kernels=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_fc, "check_fit", lambda *_, **__: None)
        for ranks_per_copy in (2, 1):
            for settings in ({"overlap": True}, fused):
                with pytest.raises(ValueError) as refused:
                    flat_head(50, 16, ArcFace(), ranks_per_copy=ranks_per_copy, **settings)
                said.append(str(refused.value))
        return said, flat_head(50, 16, ArcFace(), ranks_per_copy=4, **fused).plan.path


def test_a_user_of_the_library_is_refused_what_a_settings_file_is():
    """With several copies overlap and the fused kernels, which with one copy run."""
    for said, path in run_on_ranks(4, refuse_of_a_gpu_on_rank):
        assert all(one.startswith("ranks_per_copy with overlap = true: ") for one in said[::2])
        assert all("no gradient of centers, which copies" in one for one in said[1::2])
        assert (len(said), path) == (4, "fused")


def one_on_rank(rank, world_size):
    head = PartialFC(50, 8, EVERY_MARGIN["arcface"], ranks_per_copy=8)
    return head.copies.count, head.owned


def test_fewer_ranks_than_a_copy_has_hold_it_together():
    assert run_on_ranks(2, one_on_rank) == [(1, range(25)), (1, range(25, 50))]
