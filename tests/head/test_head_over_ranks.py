"""The sharded head in real gloo processes against arcface_torch's outputs and the fp64 oracle."""

import math

import numpy as np
import pytest
import torch

from partialfc import ArcFace, CosFace, MagFace, RowAdagrad, RowSGD
from partialfc.distributed.shares import Shares
from partialfc.head.rows.formats import decode
from partialfc.head.sampling import NOT_LOCAL, Sample
from partialfc.losses import LOSSES
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from tests.support import reference
from tests.support.collectives import Collectives
from tests.support.heads import flat_head
from tests.support.places import FIXTURES
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

GOLDEN = FIXTURES / "head"
PLAIN = RowSGD(lr=1.0, momentum=0.0, weight_decay=0.0)
GOLDEN_MARGINS = {
    "cosface": CosFace(scale=64, additive=0.4),
    "cosface_s30": CosFace(scale=30, additive=0.35),
    "arcface": ArcFace(scale=64, angular=0.5),
    "arcface_filter": ArcFace(scale=64, angular=0.5, inter_class_filter=0.15),
}


def fixed_sampler(head, sampled):
    """Sample what somebody else sampled: global identities, sorted."""
    rows = sampled[(sampled >= head.owned.start) & (sampled < head.owned.stop)] - head.owned.start

    def sample(step, identities):
        if not len(rows):
            return Sample(rows, torch.full_like(identities, NOT_LOCAL))
        local = identities - head.owned.start
        column = torch.searchsorted(rows, local).clamp(max=len(rows) - 1)
        return Sample(rows, torch.where(rows[column] == local, column, NOT_LOCAL))

    return sample


def one_step(head, embeddings, identities, centers):
    """Loss, the exact gradient of this rank's embeddings, the gradient of this rank's centers."""
    head.centers.data.copy_(centers[head.owned.start : head.owned.stop])
    mine = slice(head.ranks.rank * len(embeddings) // head.ranks.size, None)
    mine = slice(mine.start, mine.start + len(embeddings) // head.ranks.size)
    own = embeddings[mine].clone().requires_grad_()
    loss = head(own, identities[mine])
    loss.backward()
    head.optimizer.step()
    change = centers[head.owned.start : head.owned.stop] - head.centers.detach()
    return loss.item(), (own.grad / head.ranks.size).numpy(), change.numpy()


def golden_on_rank(rank, world_size):
    results = {}
    with np.load(GOLDEN / f"head_w{world_size}.npz") as file:
        data = {name: torch.from_numpy(file[name]) for name in file.files}
    for name in sorted(name for name in data if name.endswith(".loss")):
        case = name.removesuffix(".loss")
        prefix, margin_name = case.split(".")[1], case.split(".")[2]
        inputs = f"w{world_size}.{prefix}"
        centers = data[f"{inputs}.centers"]
        margin = GOLDEN_MARGINS[margin_name]
        head = flat_head(*centers.shape, margin, sample_rate=0.5, optimizer=PLAIN)
        head._samples.sampler = fixed_sampler(head, data[f"{case}.sampled"])
        results[case] = one_step(
            head, data[f"{inputs}.embeddings"], data[f"{inputs}.labels"], centers
        )
    return results


def saturation(data, case, margin):
    """What arcface_torch leaves out of the mean: it reports no sample above -log(1e-30)."""
    inputs = ".".join(case.split(".")[:2])
    sampled = torch.from_numpy(data[f"{case}.sampled"])
    losses = torch.stack(
        [
            reference.loss_of(
                torch.from_numpy(data[f"{inputs}.embeddings"][i : i + 1]).double(),
                torch.from_numpy(data[f"{inputs}.centers"]).double(),
                torch.from_numpy(data[f"{inputs}.labels"][i : i + 1]),
                reference.positive_logit(margin),
                scale=margin.scale,
                sampled=sampled,
                inter_class_filter=margin.inter_class_filter,
            )
            for i in range(len(data[f"{inputs}.labels"]))
        ]
    )
    return float((losses - losses.clamp(max=-math.log(1e-30))).mean())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_arcface_torch_is_reproduced(world_size):
    """Loss to 1e-4 relative, gradients to 1e-3 of their norm, on all golden cases.

    Our loss does not saturate, so what theirs cuts off is added to it; it is zero in most cases.
    """
    results = run_on_ranks(world_size, golden_on_rank)
    with np.load(GOLDEN / f"head_w{world_size}.npz") as data:
        assert len(results[0]) == 16
        for case in results[0]:
            losses = [result[case][0] for result in results]
            assert len(set(losses)) == 1, "the loss is the same on all ranks"
            margin = GOLDEN_MARGINS[case.split(".")[2]]
            expected = float(data[f"{case}.loss"]) + saturation(data, case, margin)
            assert losses[0] == pytest.approx(expected, rel=1e-4), case
            embedding_gradient = np.concatenate([result[case][1] for result in results])
            center_gradient = np.concatenate([result[case][2] for result in results])
            for value, expected in (
                (embedding_gradient, data[f"{case}.grad_embeddings"]),
                (center_gradient[data[f"{case}.sampled"]], data[f"{case}.grad_centers"]),
            ):
                assert np.linalg.norm(value - expected) < 1e-3 * np.linalg.norm(expected), case


ORACLE_CASES = {
    "identities do not divide by the ranks": (203, 8, 0.3, "uniform"),
    "one rank owns no positive": (400, 4, 0.3, "first"),
    "duplicates in the batch": (100, 8, 0.1, "duplicates"),
    "more positives than the sample": (64, 16, 0.05, "distinct"),
    "fewer identities than ranks": (3, 4, 0.5, "uniform"),
    "one identity": (1, 4, 1.0, "uniform"),
    "one center sampled": (300, 4, 1e-9, "first"),
    "all centers": (203, 8, 1.0, "uniform"),
    "row maximum across ranks": (203, 8, 0.3, "uniform"),
}


def oracle_case(name, world_size):
    identities, batch, rate, how = ORACLE_CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    total = batch * world_size
    embeddings = torch.randn(total, 16, generator=generator)
    centers = torch.randn(identities, 16, generator=generator)
    labels = {
        "uniform": torch.randint(0, identities, (total,), generator=generator),
        "first": torch.randint(0, max(1, identities // 8), (total,), generator=generator),
        "duplicates": torch.randint(0, 5, (total,), generator=generator) * 20,
        "distinct": torch.randperm(max(identities, total), generator=generator)[:total]
        % identities,
    }[how]
    scale = 128.0 if name.startswith("row maximum") else 64.0
    return embeddings, centers, labels, ArcFace(scale=scale, gradient="exact"), rate


def oracle_on_rank(rank, world_size):
    results = {}
    for name in ORACLE_CASES:
        embeddings, centers, labels, margin, rate = oracle_case(name, world_size)
        head = flat_head(*centers.shape, margin, sample_rate=rate, optimizer=PLAIN)
        rows = head.sampler(0, labels).rows
        rows = torch.arange(len(head.owned)) if rows is None else rows
        results[name] = (
            *one_step(head, embeddings, labels, centers),
            (rows + head.owned.start).numpy(),
        )
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sharded_equals_the_single_process_fp64_oracle(world_size):
    results = run_on_ranks(world_size, oracle_on_rank)
    for name in ORACLE_CASES:
        embeddings, centers, labels, margin, _ = oracle_case(name, world_size)
        sampled = torch.from_numpy(np.concatenate([r[name][3] for r in results])).sort().values
        loss, embedding_gradient, center_gradient = reference.truth_of(
            margin, embeddings, centers, labels, sampled
        )
        losses = {result[name][0] for result in results}
        assert len(losses) == 1, name
        assert losses.pop() == pytest.approx(loss.item(), rel=1e-5), name
        for index, expected in ((1, embedding_gradient), (2, center_gradient)):
            value = torch.from_numpy(np.concatenate([result[name][index] for result in results]))
            assert (value - expected).norm() <= 2e-5 * expected.norm() + 1e-7, name


def train_on_rank(rank, world_size, rule=None, settings=None):
    """Fifty steps of a linear backbone under DistributedDataParallel."""
    rule, settings = rule or RowSGD(lr=0.5), settings or {}
    torch.manual_seed(0)
    backbone = torch.nn.Linear(24, 16)
    if world_size > 1:
        backbone = torch.nn.parallel.DistributedDataParallel(backbone)
    head = flat_head(2000, 16, ArcFace(scale=16), sample_rate=0.1, optimizer=rule, **settings)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9)
    losses, sampled = [], []
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(24, 24, generator=generator)
        labels = torch.randint(0, 2000, (24,), generator=generator)
        mine = slice(rank * 24 // world_size, (rank + 1) * 24 // world_size)
        sampled.append((head.sampler(step, labels).rows + head.owned.start).numpy())
        loss = head(backbone(inputs[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.optimizer.step()
        losses.append(loss.item())
    return (
        losses,
        sampled,
        decode(head.centers.detach(), head.optimizer.states().get("centers_scale")).numpy(),
    )


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        pytest.param(RowSGD(lr=0.5), {}, marks=pytest.mark.slow),
        (
            RowSGD(lr=0.5, momentum_format="int8", unsampled="stay"),
            {"center_format": "fp16", "keep_mib": 0},
        ),
        (RowSGD(lr=0.5, unsampled="move"), {"center_format": "bf16"}),
        pytest.param(RowAdagrad(lr=0.1), {}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "fp16 centers, int8 momentum, stay", "bf16 centers, move", "adagrad"],
)
def test_one_seed_trains_the_same_on_1_2_and_4_ranks(rule, settings):
    """Same samples at every step; losses equal to 1e-5 after fifty steps; DDP's mean is exact.

    Stochastic rounding keeps that: its bits are those of the identity, not of the rank. Where two
    roundings differ (a gradient's last digit decides), a center differs by one spacing.
    """
    fp32 = "center_format" not in settings
    (alone,) = run_on_ranks(1, train_on_rank, rule, settings)
    for world_size in (2, 4):
        results = run_on_ranks(world_size, train_on_rank, rule, settings)
        np.testing.assert_allclose(results[0][0], alone[0], rtol=1e-5 if fp32 else 1e-3)
        for step in range(50):
            together = np.concatenate([result[1][step] for result in results])
            assert np.array_equal(together, alone[1][step])
        centers = np.concatenate([result[2] for result in results])
        tolerance = 1e-4 if fp32 else 1e-2
        assert np.linalg.norm(centers - alone[2]) < tolerance * np.linalg.norm(alone[2])


def uneven_on_rank(rank, world_size, rate, order):
    """Ten steps of two micro-batches of 11 rows: everything that a head can add to its loss."""
    torch.manual_seed(0)
    backbone = torch.nn.Linear(24, 16)
    if world_size > 1:
        backbone = torch.nn.parallel.DistributedDataParallel(backbone)
    head = flat_head(
        200,
        16,
        MagFace(scale=16),
        sample_rate=rate,
        optimizer=RowSGD(lr=0.5),
        center_weight=0.5,
        inter_class_weight=0.5,
    )
    pairs = EmbeddingLosses({name: Weighted(loss(), 0.3) for name, loss in LOSSES.items()})
    shares = Shares.of(22, world_size, 2)
    mine, part = shares.rows(rank), shares.of_each(2)
    seen = []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        inputs = 9 * torch.randn(22, 24, generator=generator)[order][mine]
        labels = torch.randint(0, 40, (22,), generator=generator)[order][mine]
        head.sample_step(labels, shares)
        backbone.zero_grad()
        for x, y in zip(inputs.chunk(2), labels.chunk(2), strict=True):
            embeddings = backbone(x)
            loss = head(embeddings, y, part) + (pairs(embeddings, y, part) if rate == 1 else 0)
            (loss / 2).backward()
            seen.append(loss.item())
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter -= 0.05 * parameter.grad
        head.optimizer.step()
    return seen, head.centers.detach().numpy()


def by_micro_batch(world_size):
    """Rows of one rank in the order that makes its micro-batches those of several ranks."""
    shares = Shares.of(22, world_size, 2)
    halves = [[], []]
    for rank in range(world_size):
        rows = torch.arange(22)[shares.rows(rank)]
        for half, part in zip(halves, rows.chunk(2), strict=True):
            half += part.tolist()
    return halves[0] + halves[1]


@pytest.mark.parametrize("rate", [1, 0.3])
def test_shares_that_differ_train_as_one_rank_does(rate):
    """A batch that its ranks do not divide: no row is lost, doubled or weighed otherwise."""
    for world_size in (2, 3):
        results = run_on_ranks(world_size, uneven_on_rank, rate, [*range(22)])
        order = by_micro_batch(world_size)
        ((losses, centers),) = run_on_ranks(1, uneven_on_rank, rate, order)
        for result in results:
            np.testing.assert_allclose(result[0], losses, rtol=1e-5)
        together = np.concatenate([result[1] for result in results])
        assert np.linalg.norm(together - centers) < 1e-5 * np.linalg.norm(centers)


def count_on_rank(rank, world_size, scale, compute):
    head = flat_head(100, 8, ArcFace(scale=scale), sample_rate=0.5, compute=compute)
    labels = torch.arange(4)

    def train():
        head(torch.randn(4, 8, requires_grad=True), labels).backward()
        head.optimizer.step()

    def evaluate():
        with torch.no_grad():
            head(torch.randn(4, 8), labels)

    counts = []
    for part in (train, train, evaluate):
        with Collectives() as one:
            part()
        counts.append(one.seen)
    return counts


@pytest.mark.parametrize(("scale", "maximum"), [(64, []), (128, [("allreduce_", 8 * 4)])])
@pytest.mark.parametrize(("compute", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_collectives_are_as_many_and_as_large_as_the_docstring_says(
    scale, maximum, compute, itemsize
):
    """b = 4 rows on each of two ranks, D = 8; nothing else goes through any process group."""
    first, step, evaluation = run_on_ranks(2, count_on_rank, scale, compute)[0]
    row = 8 * itemsize + 8
    gather = ("_allgather_base_", (1 + 4) * row)
    once = [("_allgather_base_", size) for size in (8 * 4, row, 4 * row)]
    sums = ("allreduce_", 2 * 8 * 4)
    assert step == [gather, *maximum, sums, ("_reduce_scatter_base_", 8 * 8 * 4)]
    assert evaluation == [gather, *maximum, sums]
    assert first == [*once, *step[1:]]


def refuse_on_rank(rank, world_size):
    head = flat_head(10, 8, ArcFace())
    labels = torch.tensor([0, 1]) if rank else torch.tensor([2, 10])
    try:
        head(torch.randn(2, 8), labels)
    except ValueError as error:
        return str(error)
    return ""


def test_every_rank_refuses_a_foreign_identity_of_one():
    """If only the rank that has it raised, the others would wait for ever."""
    messages = run_on_ranks(2, refuse_on_rank)
    assert messages[0] == messages[1]
    assert "got 10 at position 1" in messages[0]


def transposed_on_rank(rank, world_size):
    """The loss of embeddings whose elements lie row by row, and of the same column by column."""
    head = flat_head(10, 8, ArcFace())
    embeddings = torch.randn(2, 8, generator=torch.Generator().manual_seed(rank))
    labels = torch.tensor([rank, 5])
    return [head(value, labels).item() for value in (embeddings, embeddings.T.contiguous().T)]


def test_embeddings_may_lie_in_memory_in_any_order():
    """Ranks send bytes, which a transposed view has in another order."""
    rows, columns = run_on_ranks(2, transposed_on_rank)[0]
    assert rows == columns
