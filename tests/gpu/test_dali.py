"""DALI's GPU decoder against ours on the CPU: one stream, but for the decoder's rounding."""

import contextlib
import itertools

import pytest
import torch

from partialfc.data.augment import Augmentation
from partialfc.data.dataset import open_dataset
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.order import Order
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import write_insightface_pack
from tests.support.gpu import needs_a_gpu, needs_a_real_gpu
from tests.support.places import FIXTURES

pytest.importorskip("nvidia.dali")
pytestmark = [*needs_a_gpu, needs_a_real_gpu("decoder of DALI")]

GOLDEN = FIXTURES / "records" / "insightface.rec"


@pytest.mark.parametrize("image_size", [112, 64])
def test_batches_on_the_gpu_are_those_of_the_cpu(image_size):
    """While later batches are made and the GPU is busy, so a buffer used twice would be seen."""
    dataset = open_dataset([GOLDEN])
    stream = Stream(
        dataset=dataset,
        order=Order(len(dataset), 12, seed=5),
        augmentation=Augmentation(shift=3),
        image_size=image_size,
    )
    device, cpu = torch.device("cuda", 0), torch.device("cpu")
    with (
        contextlib.closing(open_batches(stream, 0, device=device, loader="dali")) as batches,
        contextlib.closing(open_batches(stream, 0, device=cpu, loader="torch")) as expected,
    ):
        ours = list(itertools.islice(batches, 20))
        for (images, identities, *_), (cpu_images, cpu_identities, *_) in zip(
            ours, expected, strict=False
        ):
            assert images.device == identities.device == device
            assert torch.equal(identities.cpu(), cpu_identities)
            levels = (images.cpu() - cpu_images).abs() * 127.5
            assert levels.mean() < 1
            assert levels.max() < 12


def test_an_image_that_the_gpu_cannot_decode_is_replaced(tmp_path):
    """The pipeline that gave up is followed by another, which goes on at the same batch."""
    pack = open_pack(GOLDEN)
    jpegs = [pack.jpeg(image) for image in range(24)]
    table = jpegs[6].index(b"\xff\xc4") + 5
    jpegs[6] = jpegs[6][:table] + b"\xff" * 16 + jpegs[6][table + 16 :]
    write_insightface_pack(tmp_path / "a.rec", [(0, jpeg) for jpeg in jpegs], 1)
    dataset = open_dataset([tmp_path / "a.rec"])
    stream = Stream(
        dataset=dataset, order=Order(24, 4, seed=5), augmentation=Augmentation(), image_size=112
    )
    device = torch.device("cuda", 0)
    with contextlib.closing(open_batches(stream, 0, device=device, loader="dali")) as batches:
        found = list(itertools.islice(batches, 12))
    replaced = [one.sample_id for batch in found for one in batch.replaced]
    assert replaced == [6, 6]
    assert all(batch.images.isfinite().all() for batch in found)
