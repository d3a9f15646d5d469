"""tools/two_numberings.py: its packs have the same images and people, its settings load."""

from collections import defaultdict

from partialfc.config import load
from partialfc.data.dataset import open_dataset
from partialfc.training.images import open_images
from tests.support.places import FIXTURES, ROOT
from tools import two_numberings

GOLDEN = FIXTURES / "records" / "insightface.rec"


def people(dataset):
    """The images of each identity."""
    images = defaultdict(set)
    for sample, identity in enumerate(dataset.labels().tolist()):
        images[identity].add(dataset.jpeg(sample))
    return dict(images)


def test_the_two_packs_are_the_one_with_the_map_and_twice_the_people_without(tmp_path):
    """Else the four ways would be trained on other data, and their figures compare nothing."""
    two_numberings.write_packs(open_dataset([GOLDEN]), 12, tmp_path)
    opened = {}
    for way in two_numberings.WAYS:
        config = load(ROOT / "configs/demo.toml", two_numberings.settings_of(way, tmp_path))
        assert sum(config.data.images_of_sets) == two_numberings.BATCH
        opened[way] = open_images(config)
    one = people(opened["one pack"])
    assert len(one) == 12
    assert people(opened["two packs, map"]) == one
    doubled = opened["two packs"]
    assert doubled.num_identities == opened["two packs, same_people"].num_identities == 24
    halves = people(doubled)
    assert [*halves] == [*range(24)]
    assert all(any(half < whole for whole in one.values()) for half in halves.values())
