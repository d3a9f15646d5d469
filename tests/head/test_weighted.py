"""Negatives that stand for all that they were drawn among: the whole softmax in the mean."""

import functools

import pytest
import torch

from partialfc import ArcFace, CosFace, PartialFC
from partialfc.head.plan import Machine, decide
from partialfc.head.sampling import NOT_LOCAL, KeyedSampler
from partialfc.head.sharding import Sharding, default_canonical_shards
from tests.support.center_truth import truth_of
from tests.support.every_margin import EVERY_MARGIN
from tests.support.heads import small_tiles
from tests.support.margin_heads import (
    DIM,
    IDENTITIES,
    PLAIN,
    assert_micro_batches_equal_one,
    head_of,
    problem,
    state_of,
    step,
    step_of_rank,
)
from tests.support.ranks import run_on_ranks
from tests.support.reference import relative_error

RATE = 0.3
WEIGHTED = {"sample_rate": RATE, "negatives": "weighted", "canonical_shards": 8}


def samplers(identities, rate, world_size, shards=16, seed=1):
    sharding = Sharding(num_identities=identities, canonical_shards=shards, world_size=world_size)
    return [
        KeyedSampler(sharding, rank, sample_rate=rate, seed=seed, negatives="weighted")
        for rank in range(world_size)
    ]


def batch_of(step, size, identities):
    return torch.randint(0, identities, (size,), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(("identities", "rate", "size"), [(5000, 0.1, 64), (900, 1e-9, 300)])
def test_sampled_rows_stand_for_all_identities_on_any_number_of_ranks(identities, rate, size):
    """With more positives than a quota too, where a shard had no negative to stand for its rows."""
    for number in range(5):
        batch = batch_of(number, size, identities)
        found = []
        for world_size in (1, 2, 3, 7):
            rows, weights = [], []
            for sampler in samplers(identities, rate, world_size):
                sample = sampler(number, batch)
                rows.append(sample.rows + sampler.owned.start)
                weights.append(sample.log_weight_n)
                local = sample.target_B != NOT_LOCAL
                assert (sample.log_weight_n[sample.target_B[local]] == 0).all()
            found.append((torch.cat(rows), torch.cat(weights)))
        rows, weights = found[0]
        assert all(torch.equal(rows, one) and torch.equal(weights, its) for one, its in found)
        assert weights.double().exp().sum().item() == pytest.approx(identities, rel=1e-6)


def test_the_sum_over_samples_is_that_of_the_whole_softmax():
    """600 samples: a bias of 5 % would be 5 standard errors at least; that of uniform is -70 %."""
    identities, steps = 2000, 600
    generator = torch.Generator().manual_seed(3)
    logit_BC = 1.5 * torch.randn(8, identities, generator=generator, dtype=torch.float64)
    batch = batch_of(0, 8, identities)
    whole_B = logit_BC.exp().sum(1)
    (sampler,) = samplers(identities, 0.3, 1)
    sums, plain = [], []
    for number in range(steps):
        sample = sampler(number, batch)
        exp_Bn = logit_BC[:, sample.rows].exp()
        sums.append((exp_Bn * sample.log_weight_n.double().exp()).sum(1) / whole_B)
        plain.append(exp_Bn.sum(1) / whole_B)
    sums, plain = torch.stack(sums), torch.stack(plain)
    error_B = sums.std(0) / steps**0.5
    assert (error_B < 0.01).all()
    assert ((sums.mean(0) - 1).abs() < 4 * error_B).all()
    assert ((plain.mean(0) - 1) < -20 * error_B).all()


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_softmax_in_the_mean():
    """Of embeddings near their centers, over 60 samples, against every center."""
    margin, generator = CosFace(scale=8.0, additive=0.1), torch.Generator().manual_seed(4)
    labels = batch_of(1, 8, IDENTITIES)
    near = head_of(margin).centers.detach()[labels]
    embeddings = near + 0.3 * torch.randn(8, DIM, generator=generator) * near.std()
    whole = step(head_of(margin), embeddings, labels)[1]
    found = {}
    for negatives in ("uniform", "weighted"):
        grads = []
        for seed in range(60):
            head = head_of(margin, seed=seed, **WEIGHTED | {"negatives": negatives})
            own = embeddings.clone().requires_grad_()
            head(own, labels).backward()
            grads.append(own.grad)
        found[negatives] = relative_error(torch.stack(grads).mean(0), whole)
    assert found["weighted"] < 0.1
    assert found["uniform"] > 0.3


@functools.cache
def problem_of(name):
    head = head_of(EVERY_MARGIN[name], **WEIGHTED)
    embeddings, labels = problem(head)
    return head.centers.detach().clone(), embeddings, labels, truth_of(head, embeddings, labels)


@pytest.mark.parametrize("name", EVERY_MARGIN)
def test_every_margin_weighted(name):
    """In pass 1, and in pass 2 from the exponentials of one tile that are kept, and new ones."""
    _, embeddings, labels, truth = problem_of(name)
    with small_tiles(kernels=False):
        found = step(head_of(EVERY_MARGIN[name], keep_mib=0.01, **WEIGHTED), embeddings, labels)
    for value, expected in zip(found, truth, strict=True):
        assert relative_error(value, expected) < 2e-5


def on_rank(rank, world_size, inputs):
    found = {}
    for name, (centers, embeddings, labels) in inputs.items():
        head = PartialFC(IDENTITIES, DIM, EVERY_MARGIN[name], optimizer=PLAIN, **WEIGHTED)
        own = embeddings.chunk(world_size)[rank], labels.chunk(world_size)[rank]
        found[name] = *step_of_rank(head, centers, *own), state_of(head)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_some_margins_weighted_and_sharded(world_size):
    names = [*EVERY_MARGIN][world_size // 4 :: 4]
    truth = {name: problem_of(name)[3] for name in names}
    results = run_on_ranks(world_size, on_rank, {name: problem_of(name)[:3] for name in names})
    for name in names:
        loss, *_ = results[0][name]
        assert loss == pytest.approx(truth[name][0].item(), rel=1e-5)
        for part in (1, 2):
            joined = torch.cat([torch.from_numpy(one[name][part]) for one in results])
            assert relative_error(joined, truth[name][part]) < 2e-5


def test_micro_batches_have_the_weights_of_their_batch():
    """Their sample is that of all of them, and pass 2 goes over its rows once."""
    assert_micro_batches_equal_one(**WEIGHTED)


def test_micro_batches_of_their_own_samples_keep_their_weights():
    """Without a common sample, pass 2 goes over the rows of all: each has the weights it had."""
    head = head_of(CosFace(scale=8.0), **WEIGHTED)
    embeddings, labels = problem(head)
    before, own = head.centers.detach().clone(), embeddings.clone().requires_grad_()
    grads = []
    for part, its in zip(embeddings.chunk(2), labels.chunk(2), strict=True):
        one = head_of(CosFace(scale=8.0), **WEIGHTED)
        grads.append(step(one, part, its)[2])
    for part, its in zip(own.chunk(2), labels.chunk(2), strict=True):
        head(part, its).backward()
    head.optimizer.step()
    assert relative_error(before - head.centers.detach(), grads[0] + grads[1]) < 1e-5


def by_kernels(device, name):
    _, embeddings, labels, _ = problem_of(name)
    with small_tiles(kernels=True):
        head = head_of(EVERY_MARGIN[name], device=device, **WEIGHTED)
        head.centers.data.copy_(problem_of(name)[0])
        found = step(head, embeddings.to(device), labels.to(device))
    return [value.cpu() for value in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arcface", "curricularface", "uniface"])
def test_kernels_weigh_too(launch, name):
    truth = problem_of(name)[3]
    found = launch.run(by_kernels, launch.device, name)
    for value, expected in zip(found, truth, strict=True):
        assert relative_error(value, expected) < 2e-5


def test_at_a_rate_of_1_both_are_one():
    embeddings, labels = problem(head_of(ArcFace()))
    uniform = step(head_of(ArcFace()), embeddings, labels)
    weighted = step(head_of(ArcFace(), negatives="weighted"), embeddings, labels)
    assert all(map(torch.equal, uniform, weighted))


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="negatives must be one of uniform, weighted, nearest, got 'near'"
    ):
        head_of(ArcFace(), negatives="near")
    plan = decide(
        Machine("cuda", True, (9, 0)),
        dim=512,
        unit_centers=True,
        centers_per_identity=1,
        binary=False,
        sgd=True,
        compute="bf16",
        fused=True,
        weighted=True,
    )
    with pytest.raises(ValueError, match="they count every negative once"):
        plan.refuse(fused=True)


def test_small_heads_have_fewer_shards_the_same_for_few_ranks():
    """64 shards of 3,200 identities at 0.1 sample five rows each, four of them positives."""
    small = {default_canonical_shards(3200, 4 * ranks, weighted_rate=0.1) for ranks in (1, 2, 4)}
    assert small == {16}
    large = default_canonical_shards(10_000_000, 8, weighted_rate=0.1)
    assert large == default_canonical_shards(10_000_000, 8)
    assert default_canonical_shards(3200, 40, weighted_rate=0.1) == 40
