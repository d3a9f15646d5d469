"""Negatives near to the batch: how they are found, and that the softmax is the whole one still."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from partialfc import ArcFace, CosFace, Nearest, PartialFC, RowSGD, Sets, SubCenterArcFace
from partialfc.distributed.ranks import Ranks
from partialfc.head import neighbours
from partialfc.head.neighbours import NOBODY, Rows, directions, nearest_rows
from partialfc.head.sampling import NOT_LOCAL
from tests.support.center_truth import truth_of
from tests.support.every_margin import EVERY_MARGIN
from tests.support.margin_heads import (
    DIM,
    IDENTITIES,
    assert_micro_batches_equal_one,
    head_of,
    problem,
    step,
)
from tests.support.ranks import run_on_ranks
from tests.support.reference import relative_error

CPU = torch.device("cpu")
OPTIONS = Nearest(neighbours=5, every_steps=3, share=0.5)
NEAREST = {"sample_rate": 0.3, "negatives": OPTIONS, "canonical_shards": 8}


def centers_of(rows, dim, seed=0):
    """Groups of similar rows, two equal ones, and one without a direction."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(-(-rows // 4), dim, generator=generator).repeat_interleave(4, 0)[:rows]
    centers = groups + torch.randn(rows, dim, generator=generator)
    centers[rows // 2] = centers[1]
    centers[rows // 3] = 0
    return centers


def brute_force(centers, most, per_identity=1, share=None):
    """The lists, from all products at once, in whole numbers of numpy."""
    whole = directions(centers).numpy().astype(np.int64)
    length = np.sqrt((whole * whole).sum(1).astype(np.float32))
    one = np.ones_like(length)
    score = (whole @ whole.T).astype(np.float32) * np.divide(
        one, length, out=0 * one, where=length > 0
    )
    who = np.arange(len(whole)) // per_identity
    score[who[:, None] == who] = -np.inf
    if share is not None:
        score[share] = -np.inf
    number = np.broadcast_to(np.arange(len(whole)), score.shape)
    order = np.lexsort((number, -score), axis=1)[:, :most]
    lists = np.where(np.take_along_axis(score, order, 1) > -np.inf, order, NOBODY)
    return np.pad(lists, ((0, 0), (0, most - lists.shape[1])), constant_values=NOBODY)


@pytest.mark.parametrize("tile", [32, 96, 2048])
@pytest.mark.parametrize(
    ("rows", "dim", "most", "per"), [(700, 32, 16, 1), (93, 8, 5, 3), (10, 4, 16, 1)]
)
def test_the_search_is_exact_with_any_tile(rows, dim, most, per, tile, monkeypatch):
    """Equal scores too, whose smaller number is nearer, more tiles than places in a list, and more
    blocks than are looked at at once."""
    monkeypatch.setitem(neighbours.TILE_ROWS, "cpu", tile)
    centers = centers_of(rows, dim)
    searched = Rows(centers_CD=centers, dim=dim, of_rank=[range(rows)], per_identity=per)
    found = nearest_rows(searched, most, Ranks(), CPU)
    assert np.array_equal(found.numpy(), brute_force(centers, most, per))


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("dim", [1, 3, 130, 512, 4096])
def test_the_largest_products_have_no_error_either(dim, vnni, monkeypatch):
    """Rows whose products add up to the most there is; int8 that saturated at 16 bits would not."""
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no products of int8 that add up in int32")
    monkeypatch.setattr(neighbours, "_HAS_VNNI", vnni)
    rows = torch.ones(70, dim)
    rows[1], rows[2, ::2] = -1, -1
    whole = directions(torch.cat([rows[:3], centers_of(67, dim)]))
    operand = whole.to(neighbours._operand(CPU, dim))
    found = neighbours._products(operand, operand, torch.ones(70))
    assert found.dtype == torch.float32
    assert torch.equal(found.long(), whole.long() @ whole.long().T)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_search_over_many_ranks_has_no_more_rows_and_scores_at_hand(device):
    """A block has some rows of every rank: eight of 4,096 ranks' had a GiB, and a tile four."""
    tile = neighbours.TILE_ROWS[device]
    for ranks in (1, 3, 8, 256, 1000, 4096):
        cut = neighbours.Cut.of(device, ranks)
        assert cut.block == cut.part * ranks >= tile
        most = max(8 * tile, 32 * ranks)
        assert cut.at_once * cut.block <= most
        assert cut.looking * cut.block <= max(tile * tile, 32 * cut.block)
    assert neighbours.Cut.of(device, 1) == neighbours.Cut(tile, tile, 8, tile)


def test_rows_that_are_all_alike_are_neighbours_by_their_number(monkeypatch):
    """Every column of every tile is among the best of it: none may be lost."""
    monkeypatch.setitem(neighbours.TILE_ROWS, "cpu", 64)
    searched = Rows(centers_CD=torch.ones(300, 16), dim=16, of_rank=[range(300)])
    found = nearest_rows(searched, 3, Ranks(), CPU)
    assert found[[0, 1, 299]].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 2]]


def test_directions_are_those_of_the_rows_and_their_products_have_no_error():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(500, 512, generator=generator) * 10 ** torch.linspace(-8, 8, 500).unsqueeze(
        1
    )
    rows[7, 3], rows[8, 4], rows[9] = torch.nan, torch.inf, 0
    whole = directions(rows)
    assert not whole[7:10].any()
    known = torch.cat([torch.arange(7), torch.arange(10, 500)])
    cosine, found = (F.normalize(one[known].double()) for one in (rows, whole))
    assert ((cosine @ cosine.T) - (found @ found.T)).std() < 0.0006
    longest = directions(torch.ones(1, 4096))
    assert longest.float().square().sum() <= 1 << 24


def sampled(head, step, batch):
    """Numbers of the rows of a sample, and their weights."""
    sample = head.sampler(step, batch)
    return sample.rows + head.owned.start, sample.log_weight_n


def batch_of(step, size=24, identities=IDENTITIES):
    return torch.randint(0, identities, (size,), generator=torch.Generator().manual_seed(step))


def on_rank(rank, world_size, centers, kind):
    head = PartialFC(IDENTITIES, DIM, ArcFace(), optimizer=RowSGD(), **NEAREST, **KINDS[kind])
    per = head.centers_per_identity
    head.centers.data.copy_(centers[head.owned.start * per : head.owned.stop * per])
    head.find_neighbours()
    samples = [sampled(head, number, batch_of(number)) for number in range(4)]
    return head.nearest.lists.numpy(), [tuple(one.numpy() for one in part) for part in samples]


SETS = Sets(sizes=(40, 0, 110, 1, 149), may_share=((0, 2), (4, 2), (3, 4)))
KINDS = {"plain": {}, "sets": {"sets": SETS}}


def shared(sets):
    """bool [C, C], by sets."""
    of = [number for number, size in enumerate(sets.sizes) for _ in range(size)]
    pairs = {frozenset(pair) for pair in sets.pairs}
    return np.array([[frozenset((one, other)) in pairs for other in of] for one in of])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_samples_are_the_same_on_any_number_of_ranks(kind, monkeypatch):
    """And are those of all products at once; no list has a row of a set that is left out."""
    monkeypatch.setitem(neighbours.TILE_ROWS, "cpu", 64)
    centers = centers_of(IDENTITIES, DIM)
    share = shared(SETS) if kind == "sets" else None
    lists, samples = on_rank(0, 1, centers, kind)
    assert np.array_equal(lists, brute_force(centers, OPTIONS.neighbours, share=share))
    for world_size in (2, 3, 4):
        found = run_on_ranks(world_size, on_rank, centers, kind)
        assert np.array_equal(np.concatenate([one for one, _ in found]), lists)
        for number, (rows, weights) in enumerate(samples):
            parts = [one[number] for _, one in found]
            assert np.array_equal(np.concatenate([part[0] for part in parts]), rows)
            assert np.array_equal(np.concatenate([part[1] for part in parts]), weights)


def test_a_sample_has_the_nearest_for_certain_and_the_others_stand_for_what_is_left():
    """Of each canonical shard at most the share, those that are nearer first."""
    head = head_of(ArcFace(), **NEAREST)
    head.find_neighbours()
    batch = batch_of(1, 4)
    own, place = head.nearest.near(batch.numpy())
    lists = head.nearest.lists[batch]
    assert {*own.tolist()} == {*lists.flatten().tolist()}
    assert all(place[own == one] == (lists == one).nonzero()[:, 1].min() for one in own)
    samples = [sampled(head, number, batch) for number in range(25)]
    always = {*range(IDENTITIES)}.intersection(*(rows.tolist() for rows, _ in samples))
    for rows, weights in samples:
        certain = {*rows[weights == 0].tolist()}
        assert certain == always
        assert weights.double().exp().sum().item() == pytest.approx(IDENTITIES, rel=1e-6)
    near = always - {*batch.tolist()}
    assert near < {*own.tolist()}
    first = dict(zip(own.tolist(), place.tolist(), strict=True))
    for shard in range(8):
        start, stop = head.sharding.start(shard), head.sharding.start(shard + 1)
        inside = [one for one in first if start <= one < stop and one not in batch]
        taken = [one for one in near if start <= one < stop]
        positives = len({one for one in batch.tolist() if start <= one < stop})
        assert len(taken) == min(len(inside), (head.sharding.quota(shard, 0.3) - positives) // 2)
        left = [first[one] for one in inside if one not in taken]
        assert max((first[one] for one in taken), default=0) <= min(left, default=99)


def test_the_sum_over_samples_is_that_of_the_whole_softmax():
    """250 samples in fp64: a bias of 4 standard errors, 5 % at most, fails; near rows that counted
    for others too would be far more. They carry most of the sum, so it varies far less."""
    identities, dim, steps = 2000, 128, 250
    generator = torch.Generator().manual_seed(3)
    centers = F.normalize(centers_of(identities, dim).double())
    batch = batch_of(0, 8, identities)
    near = centers[batch] + 0.05 * torch.randn(8, dim, generator=generator, dtype=torch.float64)
    logit_BC = 20 * F.normalize(near) @ centers.T
    logit_BC[torch.arange(8), batch] = 0  # a positive has its own place in the sum
    whole_B = logit_BC.exp().sum(1)
    found = {}
    for negatives in ("weighted", Nearest(neighbours=8)):
        head = PartialFC(
            identities, dim, ArcFace(), sample_rate=0.1, negatives=negatives, canonical_shards=16
        )
        head.centers.data.copy_(centers)
        head.find_neighbours()
        sums = []
        for number in range(steps):
            rows, weights = sampled(head, number, batch)
            sums.append((logit_BC[:, rows].exp() * weights.double().exp()).sum(1) / whole_B)
        sums = torch.stack(sums)
        error_B = sums.std(0) / steps**0.5
        assert ((sums.mean(0) - 1).abs() < 4 * error_B).all()
        found[negatives] = sums.std(0).mean().item()
    weighted, nearest = found.values()
    assert (error_B < 0.0125).all()
    assert nearest < 0.1 * weighted


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_softmax_in_the_mean():
    """Over 150 samples, in the direction of the whole one: a bias of 4 standard errors fails, and
    one of uniform's size would be 10."""
    margin, generator = CosFace(scale=8.0, additive=0.1), torch.Generator().manual_seed(4)
    labels, centers = batch_of(1, 8), centers_of(IDENTITIES, DIM)

    def gradients(seed, **settings):
        head = head_of(margin, seed=seed, **settings)
        head.centers.data.copy_(centers)
        own = embeddings.clone().requires_grad_()
        before = centers.clone()
        head(own, labels).backward()
        head.optimizer.step()
        return torch.cat([own.grad.flatten(), (before - head.centers.detach()).flatten()]).double()

    embeddings = centers[labels] + 0.5 * torch.randn(8, DIM, generator=generator)
    whole = gradients(0)
    of_embeddings = slice(0, 8 * DIM)
    for part in (of_embeddings, slice(8 * DIM, None)):
        along = whole[part] / whole[part].square().sum()
        biases = {}
        for negatives in ("uniform", OPTIONS):
            settings = {**NEAREST, "negatives": negatives}
            share = torch.stack([gradients(seed, **settings)[part] @ along for seed in range(150)])
            biases[negatives] = (share.mean() - 1).abs() / (share.std() / len(share) ** 0.5)
        assert biases[OPTIONS] < 4
        assert biases["uniform"] > 10


@pytest.mark.parametrize("name", ["arcface", "curricularface", "sub-center arcface", "softmax"])
def test_losses_and_gradients_have_these_weights(name):
    head = head_of(EVERY_MARGIN[name], **NEAREST)
    embeddings, labels = problem(head)
    head.find_neighbours()
    assert (head.sampler(0, labels).log_weight_n == 0).sum() > len(labels.unique())
    truth = truth_of(head, embeddings, labels)
    for value, expected in zip(step(head, embeddings, labels), truth, strict=True):
        assert relative_error(value, expected) < 2e-5


def trained(head, steps):
    """Losses of some steps."""
    losses = []
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        embeddings = torch.randn(24, DIM, generator=generator, requires_grad=True)
        loss = head(embeddings, batch_of(number))
        loss.backward()
        head.optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
@pytest.mark.parametrize("unsampled", ["stay", "move"])
def test_a_head_goes_on_to_the_last_bit_between_two_searches_too(stop, unsampled):
    rule = RowSGD(lr=0.5, unsampled=unsampled)
    straight, first, second = (head_of(ArcFace(), optimizer=rule, **NEAREST) for _ in range(3))
    losses = trained(straight, range(8))
    assert trained(first, range(stop)) == losses[:stop]
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert trained(second, range(stop, 8)) == losses[stop:]
    assert torch.equal(second.centers, straight.centers)
    assert torch.equal(second.nearest.lists, straight.nearest.lists)


def test_lists_stay_between_two_searches_and_follow_the_centers_then():
    head = head_of(ArcFace(), optimizer=RowSGD(lr=5.0), **NEAREST)
    seen = []
    for number in range(7):
        trained(head, [number])
        seen.append(head.nearest.lists.clone())
    same = [torch.equal(one, other) for one, other in pairwise(seen)]
    assert same == [True, True, False, True, True, False]


def test_micro_batches_have_the_sample_of_their_batch():
    assert_micro_batches_equal_one(**NEAREST)


@pytest.mark.parametrize("how", ["prefetch", "ahead"])
def test_rows_in_host_memory_are_searched_too_and_brought_ahead_across_a_search(how):
    """A step that begins with a search is not drawn before: its lists are not made yet."""
    rule = RowSGD(lr=0.5, unsampled="stay")
    there, here = (
        head_of(ArcFace(), optimizer=rule, centers_in=where, states_in=where, **NEAREST)
        for where in ("host", "device")
    )
    losses = []
    for number in range(5):
        if how == "ahead":
            there.sample_step(batch_of(number + 1), ahead=True)
        else:
            there.prefetch(batch_of(number + 1))
        losses += trained(there, [number])
    assert losses == trained(here, range(5))
    assert torch.equal(there.nearest.lists, here.nearest.lists)


def test_sub_centers_are_no_neighbours_of_their_own():
    head = head_of(SubCenterArcFace(sub_centers=3), **NEAREST)
    head.find_neighbours()
    own = torch.arange(IDENTITIES).repeat_interleave(3).unsqueeze(1)
    assert (head.nearest.lists // 3 != own).all()
    sample = head.sampler(0, batch_of(0))
    assert (sample.target_B != NOT_LOCAL).all()


def test_at_a_rate_of_1_there_are_no_lists():
    embeddings, labels = problem(head_of(ArcFace()))
    head = head_of(ArcFace(), negatives="nearest")
    assert head.nearest is None
    uniform = step(head_of(ArcFace()), embeddings, labels)
    assert all(map(torch.equal, uniform, step(head, embeddings, labels)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": 0}, r"neighbours must be in \[1, 1024\], got 0"),
        ({"every_steps": 0}, "every_steps must be >= 1, got 0"),
        ({"share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Nearest(**settings)
