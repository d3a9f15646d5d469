import pytest

from partialfc.head.sharding import Sharding, default_canonical_shards


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("identities", [1, 3, 500, 503, 70_001])
def test_ranks_own_every_identity_once_in_order(world_size, identities):
    sharding = Sharding(num_identities=identities, canonical_shards=64, world_size=world_size)
    owned = [i for rank in range(world_size) for i in sharding.owned(rank)]
    assert owned == list(range(identities))


@pytest.mark.parametrize("world_size", [7, 8])
def test_load_is_even_within_one_canonical_shard(world_size):
    sharding = Sharding(num_identities=100_000, canonical_shards=64, world_size=world_size)
    sizes = [len(sharding.owned(rank)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 100_000 / 64 + 1


@pytest.mark.parametrize("rate", [1e-9, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("identities", [1, 37, 503, 100_000])
def test_quotas_add_up_to_the_rate_and_fit_their_shard(rate, identities):
    sharding = Sharding(num_identities=identities, canonical_shards=64, world_size=1)
    quotas = [sharding.quota(shard, rate) for shard in range(64)]
    assert sum(quotas) == max(1, round(rate * identities))
    for shard, quota in enumerate(quotas):
        assert 0 <= quota <= sharding.start(shard + 1) - sharding.start(shard)


def test_too_few_shards_for_the_ranks_names_the_remedy():
    with pytest.raises(ValueError, match=r"64 shards for 65 ranks; set head\.canonical_shards"):
        Sharding(num_identities=10, canonical_shards=64, world_size=65)


def test_default_shards_depend_on_identities_and_are_enough_for_the_ranks():
    assert default_canonical_shards(93_431) == default_canonical_shards(93_431, 91) == 91
    assert default_canonical_shards(93_431, 512) == 512
    assert default_canonical_shards(100) == 64
    assert default_canonical_shards(200_000) == 195
    assert default_canonical_shards(10**8) == 1024
