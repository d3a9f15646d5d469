import itertools

import numpy as np
import pytest
import torch

from partialfc.keyed import key, keys, permute, uniform, unpermute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_is_a_bijection_with_an_inverse(size):
    index = np.arange(size)
    for seed in range(5):
        image = permute(index, size, key(seed, "test"))
        assert np.array_equal(np.sort(image), index)
        assert np.array_equal(unpermute(image, size, key(seed, "test")), index)


def test_numpy_and_torch_agree():
    """A GPU sampler and a numpy data order must never disagree about the same key."""
    index = np.arange(3000)
    image = permute(index, 3000, key(7, "test", 3))
    assert np.array_equal(permute(torch.from_numpy(index), 3000, key(7, "test", 3)).numpy(), image)


def test_per_element_size_and_key_do_not_depend_on_what_else_is_asked():
    """Ranks ask for different shards; each shard's permutation must be the same for all."""
    sizes = np.array([16, 17, 7])
    shard_keys = keys(np.arange(3), key(1, "test"))
    shard = np.repeat(np.arange(3), sizes)
    index = np.concatenate([np.arange(size) for size in sizes])
    together = permute(index, sizes[shard], shard_keys[shard], largest=17)
    for number, size in enumerate(sizes):
        mine = shard == number
        alone = permute(index[mine], sizes[shard][mine], shard_keys[shard][mine], largest=17)
        assert np.array_equal(together[mine], alone)
        assert np.array_equal(np.sort(alone), np.arange(size))
    back = unpermute(together, sizes[shard], shard_keys[shard], largest=17)
    assert np.array_equal(back, index)


def test_large_sizes_stay_in_range_and_invert():
    """int64 arithmetic wraps inside the network; nothing of it may leak out."""
    size = 10**9 + 7
    index = np.random.default_rng(0).integers(0, size, 10_000)
    image = permute(index, size, key(-5, "test"))
    assert image.min() >= 0
    assert image.max() < size
    assert np.array_equal(unpermute(image, size, key(-5, "test")), index)


@pytest.mark.parametrize("size", [5, 7, 10, 24])
def test_places_and_pairs_are_uniform(size):
    """Chi-square over 20,000 keys: of the place of one element, and of two elements together."""
    draws = 20_000
    element_keys = np.repeat(keys(np.arange(draws), key(3, "test"))[:, None], size, axis=1)
    images = permute(np.tile(np.arange(size), (draws, 1)), size, element_keys)
    for place in range(size):
        counts = np.bincount(images[:, place], minlength=size)
        chi = ((counts - draws / size) ** 2 / (draws / size)).sum()
        assert chi < size - 1 + 6 * np.sqrt(2 * (size - 1))
    for one, other in itertools.islice(itertools.combinations(range(size), 2), 12):
        counts = np.bincount(images[:, one] * size + images[:, other], minlength=size * size)
        counts = counts.reshape(size, size)[~np.eye(size, dtype=bool)]
        expected = draws / (size * (size - 1))
        freedom = size * (size - 1) - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_keys_differ_by_every_part():
    made = {key(s, p, c) for s in range(10) for p in ("order", "negatives") for c in range(10)}
    assert len(made) == 200
    assert key(1, "order", 2, 3) != key(1, "order", 3, 2)


def test_uniform_is_uniform_and_a_function_of_the_id():
    ids = np.arange(100_000)
    values = uniform(ids, key(1, "flip", 0))
    assert np.array_equal(values[::-1], uniform(ids[::-1], key(1, "flip", 0)))
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.bincount((values * 50).astype(int), minlength=50)
    assert ((counts - 2000) ** 2 / 2000).sum() < 49 + 6 * np.sqrt(98)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
