import numpy as np
import pytest
import torch

from partialfc.head.sampling import NOT_LOCAL, KeyedSampler
from partialfc.head.sharding import Sharding


def samplers(identities, rate, world_size=1, shards=64, seed=1):
    sharding = Sharding(num_identities=identities, canonical_shards=shards, world_size=world_size)
    return [KeyedSampler(sharding, rank, sample_rate=rate, seed=seed) for rank in range(world_size)]


def global_rows(sampler, step, batch):
    return sampler(step, batch).rows + sampler.owned.start


@pytest.mark.parametrize("rate", [1e-9, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_are_distinct_and_targets_point_at_their_identity(rate, world_size):
    batch = torch.randint(0, 503, (40,), generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(40, dtype=torch.int64)
    for sampler in samplers(503, rate, world_size):
        sample = sampler(5, batch)
        assert (sample.rows.diff() > 0).all(), "distinct, and in the order of the memory"
        local = sample.target_B != NOT_LOCAL
        rows = sample.rows[sample.target_B[local]] + sampler.owned.start
        assert torch.equal(rows, batch[local])
        seen += local
    assert (seen == 1).all(), "each positive is local to exactly one rank"


def test_size_is_exact_when_the_positives_fit():
    (sampler,) = samplers(100_000, 0.1)
    assert len(sampler(0, torch.tensor([5, 99_999, 5])).rows) == 10_000


def test_more_positives_than_the_sample_are_all_sampled():
    (sampler,) = samplers(50, 0.1, shards=2)
    rows = sampler(0, torch.arange(25)).rows
    # The first shard holds 25 positives for a quota of 2 or 3; the second keeps its quota.
    assert set(range(25)) < set(rows.tolist())
    assert 25 + 2 <= len(rows) <= 25 + 3


@pytest.mark.parametrize("rate", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("identities", [5000, 64 * 64 + 1])
def test_any_world_size_samples_the_same_rows(rate, identities):
    """The heart of elastic resume: any number of ranks draws the same centers at every step."""
    for step in range(5):
        batch = torch.randint(0, identities, (64,), generator=torch.Generator().manual_seed(step))
        samples = []
        for world_size in (1, 2, 3, 4, 7, 8):
            parts = []
            for sampler in samplers(identities, rate, world_size):
                sample = sampler(step, batch)
                rows = sample.rows
                if rows is None:
                    rows = torch.arange(len(sampler.owned))
                parts.append(rows + sampler.owned.start)
            samples.append(torch.cat(parts))
        assert all(torch.equal(samples[0], other) for other in samples[1:])


def test_steps_and_seeds_draw_different_negatives():
    batch = torch.tensor([1, 2, 3])
    (sampler,), (reseeded,) = samplers(10_000, 0.1), samplers(10_000, 0.1, seed=2)
    first = set(global_rows(sampler, 0, batch).tolist())
    for other in (global_rows(sampler, 1, batch), global_rows(reseeded, 0, batch)):
        # Two independent samples of 1000 of 10,000 share about 100.
        assert len(first & set(other.tolist())) < 200


def test_negatives_are_uniform_without_replacement_given_the_positives():
    """Chi-square of single negatives and of their pairs, over steps and canonical shards."""
    steps, shards, size, quota, positives = 24, 500, 24, 8, np.array([3, 3, 17])
    (sampler,) = samplers(shards * size, quota / size, shards=shards)
    batch = torch.from_numpy((size * np.arange(shards)[:, None] + positives).ravel())
    taken = np.zeros((steps, shards, size))
    for step in range(steps):
        taken[step].reshape(-1)[sampler(step, batch).rows.numpy()] = 1
    taken = taken.reshape(-1, size)
    assert (taken.sum(1) == quota).all()
    assert taken[:, positives].all()
    others = np.setdiff1d(np.arange(size), positives)
    singles, pairs = taken.sum(0), taken.T @ taken
    drawn, draws = quota - 2, steps * shards
    expected = draws * drawn / len(others)
    variance = expected * (1 - drawn / len(others))
    deviation = (singles[others] - expected) / np.sqrt(variance)
    assert np.abs(deviation).max() < 4.5
    expected = draws * drawn * (drawn - 1) / (len(others) * (len(others) - 1))
    upper = pairs[np.ix_(others, others)][np.triu_indices(len(others), 1)]
    assert np.abs((upper - expected) / np.sqrt(expected)).max() < 5
    assert np.std((upper - expected) / np.sqrt(expected)) < 1.2


def test_a_rank_without_identities_samples_nothing():
    parts = [s(0, torch.tensor([0, 1, 2])) for s in samplers(3, 0.5, world_size=4)]
    assert sum(len(part.rows) for part in parts) >= 3
    assert any(len(part.rows) == 0 for part in parts)


def test_rate_out_of_range_is_refused():
    for rate in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"sample_rate must be in \(0, 1\]"):
            samplers(10, rate)
