"""Both loaders yield one stream: the same images, in the same order, changed in the same way."""

import contextlib
import io
import itertools
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from partialfc.data.augment import CHANGES, Augmentation, draw
from partialfc.data.dataset import open_dataset
from partialfc.data.images.jpeg import decode
from partialfc.data.loaders.loader import open_batches
from partialfc.data.loaders.stream import Stream
from partialfc.data.loaders.torch_loader import torch_batches
from partialfc.data.order import Order
from partialfc.data.packs.writer import PackWriter
from tests.support.images import LOADERS, encoded, lopsided
from tests.support.places import FIXTURES
from tests.support.waiting import wait_for

CPU = torch.device("cpu")
GOLDEN = FIXTURES / "records" / "insightface.rec"


def golden_stream(image_size=112, *, batch=12, last_batch="drop", shift=3, rank=0, world_size=1):
    dataset = open_dataset([GOLDEN])
    return Stream(
        dataset=dataset,
        order=Order(len(dataset), batch, seed=5, last_batch=last_batch),
        augmentation=Augmentation(shift=shift),
        image_size=image_size,
        rank=rank,
        world_size=world_size,
    )


def take(number, stream, samples_seen=0, *, loader="torch"):
    """The next batches of a stream, images in levels of 0...255."""
    batches = open_batches(stream, samples_seen, device=CPU, loader=loader, threads=1)
    with contextlib.closing(batches):
        return [
            (images.numpy() * 127.5 + 127.5, identities.numpy())
            for images, identities, *_ in itertools.islice(batches, number)
        ]


def written(folder: Path, jpegs: list[bytes]) -> Path:
    path = folder / "images.rec"
    with PackWriter(path) as writer:
        for key, data in enumerate(jpegs):
            writer.write(key, key % 3, data)
    return path


def triangle(length: int, size: int) -> np.ndarray:
    """fp64 weights [size, length] of a bilinear filter, widened by the scale where it shrinks."""
    center = (np.arange(size)[:, None] + 0.5) * length / size - 0.5
    weight = np.clip(1 - np.abs(np.arange(length) - center) / max(length / size, 1), 0, None)
    return weight / weight.sum(1, keepdims=True)


def expected_images(stream: Stream, samples_seen: int) -> np.ndarray:
    """fp64 levels [B, 3, S, S] of one batch, pixel by pixel from the definitions."""
    ids = stream.order.sample_ids(samples_seen, stream.rank, stream.world_size)
    epoch = stream.order.epoch(samples_seen)
    size, images = stream.image_size, []
    draws = draw(stream.augmentation, stream.order.seed, epoch, ids, size)
    for sample_id, shift_x, shift_y, flip in zip(ids, *draws[:3], strict=True):
        data = stream.dataset.jpeg_view(int(sample_id))
        pixels = decode(data).astype(float)
        if Image.open(io.BytesIO(data.tobytes())).getexif().get(274) == 6:  # right side up
            pixels = np.rot90(pixels, -1)
        rows, columns = triangle(pixels.shape[0], size), triangle(pixels.shape[1], size)
        image = rows @ pixels.transpose(2, 0, 1) @ columns.T
        margin = stream.augmentation.shift
        padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="edge")
        top, left = margin - shift_y, margin - shift_x
        image = padded[:, top : top + size, left : left + size]
        images.append(image[:, :, ::-1] if flip else image)
    return np.stack(images)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_batches_are_the_images_of_the_order(loader, last_batch):
    """Over two epochs: no image is moved, mirrored or normalised otherwise than it should be."""
    stream = golden_stream(batch=14, last_batch=last_batch)
    for step, (images, identities) in enumerate(take(9, stream, loader=loader)):
        ids = stream.order.sample_ids(14 * step)
        assert identities.tolist() == stream.dataset.identities(ids).tolist()
        np.testing.assert_allclose(images, expected_images(stream, 14 * step), atol=1e-4)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("flip", "column"), [(0.0, 48), (1.0, 111 - 48)])
def test_a_shift_to_the_right_and_down_moves_a_spot_there(tmp_path, loader, flip, column):
    """Against one look at one spot, should the definitions above be wrong together."""
    pixels = np.zeros((112, 112, 3), np.uint8)
    pixels[16:32, 40:56] = 255  # its middle is row 24, column 48
    path = written(tmp_path, [encoded(pixels)] * 40)
    stream = Stream(
        dataset=open_dataset([path]),
        order=Order(40, 40, seed=5),
        augmentation=Augmentation(shift=8, flip=flip),
        image_size=112,
    )
    draws = draw(stream.augmentation, 5, 0, stream.order.sample_ids(0), 112)
    assert min(draws.shift_x_B.min(), draws.shift_y_B.min()) < -5
    [(images, _)] = take(1, stream, loader=loader)
    weight = (images > 128).mean(1)
    direction = -1 if flip else 1
    middle_row = (weight * np.arange(112)[:, None]).sum((1, 2)) / weight.sum((1, 2)) + 0.5
    middle_column = (weight * np.arange(112)).sum((1, 2)) / weight.sum((1, 2)) + 0.5
    np.testing.assert_allclose(middle_row, 24 + draws.shift_y_B, atol=0.1)
    np.testing.assert_allclose(
        middle_column, column + bool(flip) + direction * draws.shift_x_B, atol=0.1
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("image_size", [64, 112])
def test_images_of_any_size_and_kind_are_resized_without_aliasing(tmp_path, loader, image_size):
    """Against a filter in fp64: ours within the rounding, half a level; DALI within 2."""
    jpegs = [
        encoded(lopsided(height, width, seed), progressive=seed % 2 == 1)
        for seed, (height, width) in enumerate([(112, 112), (64, 64), (96, 128), (250, 200)])
    ]
    jpegs.append(encoded(lopsided(112, 112, 9)[:, :, 0]))
    exif = Image.Exif()
    exif[274] = 6  # stored turned by 90 degrees
    jpegs.append(encoded(lopsided(112, 112, 10), exif=exif))
    stream = Stream(
        dataset=open_dataset([written(tmp_path, jpegs)]),
        order=Order(6, 6, seed=5),
        augmentation=Augmentation(shift=2),
        image_size=image_size,
    )
    [(images, _)] = take(1, stream, loader=loader)
    error = np.abs(images - expected_images(stream, 0))
    assert error.max() < (0.51 if loader == "torch" else 2)
    assert error.mean() < 0.26


CHANGED = {
    "crop": lambda image, value: image_crop(image, value),
    "rotate": lambda image, value: image_rotation(image, float(value[0])),
    "grey": lambda image, value: np.repeat(image @ [[0.299], [0.587], [0.114]], 3, 2),
    "cutout": lambda image, value: image_cutout(image, value),
}


def image_crop(image, value):
    top, left, bottom, right = value.astype(int)
    part = image[top:bottom, left:right].transpose(2, 0, 1)
    rows, columns = triangle(bottom - top, 112), triangle(right - left, 112)
    return (rows @ part @ columns.T).transpose(1, 2, 0)


def image_rotation(image, degrees):
    """Bilinear in fp64, outermost pixels beyond the border; DALI turns clockwise on the screen."""
    angle = np.deg2rad(degrees)
    y, x = np.mgrid[:112, :112] - 55.5
    u = np.clip(np.cos(angle) * x - np.sin(angle) * y + 55.5, 0, 111)
    v = np.clip(np.sin(angle) * x + np.cos(angle) * y + 55.5, 0, 111)
    left, top = np.minimum(u.astype(int), 110), np.minimum(v.astype(int), 110)
    du, dv = (u - left)[..., None], (v - top)[..., None]
    upper = image[top, left] * (1 - du) + image[top, left + 1] * du
    lower = image[top + 1, left] * (1 - du) + image[top + 1, left + 1] * du
    return upper * (1 - dv) + lower * dv


def image_cutout(image, value):
    top, left, bottom, right = value.astype(int)
    image = image.copy()
    image[top:bottom, left:right] = 128
    return image


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """Colourful images without edges, as photographs are at this size."""
    rng = np.random.default_rng(3)
    images = [
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((112, 112), 3)
        for _ in range(24)
    ]
    return written(tmp_path_factory.mktemp("smooth"), [encoded(np.asarray(i)) for i in images])


def changed_stream(path, rank=0, world_size=1, **changes):
    dataset = open_dataset([path])
    return Stream(
        dataset=dataset,
        order=Order(24, 12, seed=5),
        augmentation=Augmentation(flip=0, **changes),
        image_size=112,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_happens_to_the_chosen_images_and_is_what_it_says(smooth, loader, name):
    """Where there is a short equation, against it in fp64; else for what it must do."""
    if loader == "torch" and name != "crop":
        pytest.skip("DALI only: see test_changes_that_a_loader_does_not_make_are_refused")
    plain = take(2, changed_stream(smooth), loader=loader)
    stream, differences = changed_stream(smooth, **{name: 0.5}), []
    for step, (images, _) in enumerate(take(2, stream, loader=loader)):
        ids = stream.order.sample_ids(12 * step)
        drawn = draw(stream.augmentation, 5, 0, ids, 112).changes[name]
        before = plain[step][0]
        assert 0 < drawn.chosen_B.sum() < 12
        np.testing.assert_allclose(images[~drawn.chosen_B], before[~drawn.chosen_B], atol=1e-4)
        for i in np.flatnonzero(drawn.chosen_B):
            old, new = (part[i].transpose(1, 2, 0) for part in (before, images))
            if name in CHANGED:
                expected = CHANGED[name](old.astype(float), drawn.value_Bn[i])
                assert np.abs(new - expected).max() < 2.5, name
                assert np.abs(new - expected).mean() < 0.6
            difference = np.abs(new - old).mean()
            differences.append(difference)
            if name in ("blur", "downscale"):
                assert np.abs(np.diff(new, axis=0)).mean() <= np.abs(np.diff(old, axis=0)).mean()
            if name == "jpeg":
                assert difference < 12
    assert 0.3 < np.median(differences) < 90


@pytest.mark.parametrize("loader", LOADERS)
def test_a_part_is_cut_out_of_the_file_and_not_of_the_smaller_image(tmp_path, loader):
    """Cut after resizing, it would be made larger again, less sharp than what is measured."""
    rng = np.random.default_rng(3)
    large = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).resize((224, 224)))
        for _ in range(6)
    ]
    jpegs = [encoded(image) for image in large]
    stream = Stream(
        dataset=open_dataset([written(tmp_path, jpegs)]),
        order=Order(6, 6, seed=5),
        augmentation=Augmentation(flip=0, crop=1, crop_side=0.5),
        image_size=112,
    )
    [(images, _)] = take(1, stream, loader=loader)
    ids = stream.order.sample_ids(0)
    boxes = 2 * draw(stream.augmentation, 5, 0, ids, 112).changes["crop"].value_Bn
    for image, sample, box in zip(images, ids, boxes, strict=True):
        source = np.asarray(Image.open(io.BytesIO(jpegs[sample])).convert("RGB"), np.float64)
        error = np.abs(image.transpose(1, 2, 0) - image_crop(source, box))
        assert error.max() < 6  # 40 and more, if it is cut afterwards
        assert error.mean() < 0.6


@pytest.mark.skipif("dali" not in LOADERS, reason="DALI is not installed here")
def test_all_changes_together_are_the_same_on_ranks_and_after_a_resume(smooth):
    """Every number is an input of DALI; one that it drew itself would differ here."""
    changes = dict.fromkeys(CHANGES, 0.6)
    whole = take(4, changed_stream(smooth, **changes), loader="dali")
    for world_size in (2, 3):
        ranks = [
            take(4, changed_stream(smooth, rank, world_size, **changes), loader="dali")
            for rank in range(world_size)
        ]
        for step, (images, _) in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([r[step][0] for r in ranks]), images)
    again = take(2, changed_stream(smooth, **changes), 24, loader="dali")
    for (images, _), (ours, _) in zip(whole[2:], again, strict=True):
        np.testing.assert_array_equal(ours, images)


def test_changes_that_a_loader_does_not_make_are_refused(smooth):
    """No setting is ignored: the torch loader would train on other images than DALI."""
    with pytest.raises(ValueError, match=r"data.augment.blur = 0.5: .*data.augment.jpeg=0"):
        take(1, changed_stream(smooth, crop=0.5, blur=0.5, jpeg=0.1), loader="torch")


@pytest.mark.skipif("dali" not in LOADERS, reason="DALI is not installed here")
@pytest.mark.parametrize(("image_size", "largest", "mean"), [(112, 1e-4, 1e-5), (64, 1.001, 0.01)])
def test_dali_and_torch_yield_the_same_pixels(image_size, largest, mean):
    """In levels of 255: float rounding at the stored size; one level here and there if resized."""
    stream = golden_stream(image_size)
    for (ours, identities), (dalis, their_identities) in zip(
        take(6, stream), take(6, stream, loader="dali"), strict=True
    ):
        assert ours.dtype == dalis.dtype == np.float32
        np.testing.assert_array_equal(identities, their_identities)
        assert np.abs(ours - dalis).max() < largest
        assert np.abs(ours - dalis).mean() < mean


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(loader, world_size):
    whole = take(6, golden_stream(), loader=loader)
    ranks = [
        take(6, golden_stream(rank=rank, world_size=world_size), loader=loader)
        for rank in range(world_size)
    ]
    for step, (images, identities) in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([r[step][0] for r in ranks]), images)
        np.testing.assert_array_equal(np.concatenate([r[step][1] for r in ranks]), identities)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_a_stream_opened_anywhere_has_the_same_tail(loader, step):
    whole = take(9, golden_stream(), loader=loader)
    for (images, identities), (ours, our_identities) in zip(
        whole[step:], take(9 - step, golden_stream(), 12 * step, loader=loader), strict=True
    ):
        np.testing.assert_array_equal(images, ours)
        np.testing.assert_array_equal(identities, our_identities)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 3)])
def test_threads_do_not_change_the_order(threads, prefetch):
    stream = golden_stream(64)
    batches = torch_batches(stream, 0, device=CPU, threads=threads, prefetch=prefetch)
    with contextlib.closing(batches):
        for images, identities in take(12, stream):
            ours, our_identities, *_ = next(batches)
            np.testing.assert_array_equal(ours.numpy() * 127.5 + 127.5, images)
            np.testing.assert_array_equal(our_identities, identities)


def damage(data: bytes, kind: str) -> bytes:
    size = data.index(b"\xff\xc0") + 5
    table = data.index(b"\xff\xc4") + 5
    return {
        "truncated": data[: len(data) // 2],
        "bomb": data[:size] + b"\xff\xdc\xff\xdc" + data[size + 4 :],
        "table": data[:table] + b"\xff" * 16 + data[table + 16 :],  # only a decoder sees this
        "png": b"\x89PNG\r\n\x1a\n" + data,
    }[kind]


RECORD_DAMAGE = {"magic": (0, b"\0\0\0\0"), "label": (12, np.float32(np.nan).tobytes())}
KINDS = ["truncated", "bomb", "table", "png", *RECORD_DAMAGE]


def broken(folder: Path, damages: dict[int, str], count=24) -> Path:
    """A pack with some images that cannot be used."""
    jpegs = [encoded(lopsided(32, 32, seed)) for seed in range(count)]
    for image, kind in damages.items():
        if kind not in RECORD_DAMAGE:
            jpegs[image] = damage(jpegs[image], kind)
    path = written(folder, jpegs)
    offsets = [int(line.split()[1]) for line in path.with_suffix(".idx").read_text().splitlines()]
    data = bytearray(path.read_bytes())
    for image, kind in damages.items():
        if kind in RECORD_DAMAGE:
            at, value = RECORD_DAMAGE[kind]
            data[offsets[image] + at : offsets[image] + at + 4] = value
    path.write_bytes(data)
    return path


def broken_stream(path: Path, batch=4, rank=0, world_size=1) -> Stream:
    dataset = open_dataset([path])
    dataset.packs[0].declared_identities = 3  # a plain pack with a bad label has no number
    return Stream(
        dataset=dataset,
        order=Order(len(dataset), batch, seed=5),
        augmentation=Augmentation(shift=2),
        image_size=32,
        rank=rank,
        world_size=world_size,
    )


def with_replacements(loader: str, stream: Stream, number: int, samples_seen=0):
    """Batches, images in levels, the samples that were replaced, and those that are there."""
    batches = open_batches(stream, samples_seen, device=CPU, loader=loader, threads=1)
    with contextlib.closing(batches):
        return [
            (
                images.numpy() * 127.5 + 127.5,
                identities.numpy(),
                [one.sample_id for one in replaced],
                sample_ids.tolist(),
            )
            for images, identities, replaced, sample_ids, _ in itertools.islice(batches, number)
        ]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_replaced_by_the_next_of_the_epoch(tmp_path, loader, kind, capfd):
    """With the augmentation of the one that it replaces, to the end of two epochs."""
    stream, bad = broken_stream(broken(tmp_path, {6: kind, 17: "table"})), {6, 17}
    before = {*threading.enumerate()}
    found = with_replacements(loader, stream, 12)
    for step, (images, identities, replaced, sample_ids) in enumerate(found):
        epoch = step // 6
        order = stream.order.at(epoch, np.arange(48)).sample_id_B  # a second time past its end
        wanted = stream.order.sample_ids(4 * step)
        assert replaced == [i for i in wanted.tolist() if i in bad]
        draws = draw(stream.augmentation, 5, epoch, wanted, 32)
        for i, sample in enumerate(wanted.tolist()):
            place = int(np.flatnonzero(order == sample)[0])
            stands = next(other for other in order[place:].tolist() if other not in bad)
            assert identities[i] == stands % 3
            assert sample_ids[i] == stands, "a teacher's embedding is looked up by it"
            pixels = decode(stream.dataset.jpeg_view(stands))
            padded = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), mode="edge")
            top, left = 2 - draws.shift_y_B[i], 2 - draws.shift_x_B[i]
            expected = padded[top : top + 32, left : left + 32]
            expected = expected[:, ::-1] if draws.flip_B[i] else expected
            np.testing.assert_allclose(images[i], expected.transpose(2, 0, 1), atol=1e-4)
    assert {*threading.enumerate()} <= before
    capfd.readouterr()  # DALI's own report


@pytest.mark.parametrize("loader", LOADERS)
def test_replacements_are_the_same_on_any_number_of_ranks_and_after_a_resume(tmp_path, loader):
    """Half of the images are bad, several in a row, across the ends of batches and ranks."""
    damages = {image: KINDS[image % len(KINDS)] for image in range(0, 24, 2)}
    path = broken(tmp_path, damages)
    whole = with_replacements("torch", broken_stream(path), 8)
    assert sum(len(replaced) for _, _, replaced, _ in whole) > 8
    for world_size in (2, 4):
        ranks = [
            with_replacements(loader, broken_stream(path, 4, rank, world_size), 8)
            for rank in range(world_size)
        ]
        for step, (images, identities, replaced, sample_ids) in enumerate(whole):
            parts = [rank[step] for rank in ranks]
            assert [sample for part in parts for sample in part[3]] == sample_ids
            np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), images, atol=1e-4)
            assert np.concatenate([p[1] for p in parts]).tolist() == identities.tolist()
            assert [sample for part in parts for sample in part[2]] == replaced
    for start in (1, 4, 7):
        again = with_replacements(loader, broken_stream(path), 8 - start, 4 * start)
        for (images, identities, *samples), ours in zip(whole[start:], again, strict=True):
            np.testing.assert_allclose(ours[0], images, atol=1e-4)
            assert (ours[1].tolist(), [*ours[2:]]) == (identities.tolist(), samples)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pack_without_a_good_image_is_an_error_that_names_one(tmp_path, loader):
    """Not an endless search."""
    path = broken(tmp_path, dict.fromkeys(range(24), "png"))
    with pytest.raises(ValueError, match=rf"256 images in a row .*{re.escape(str(path))}: image "):
        take(1, broken_stream(path), loader=loader)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ends just now
            found += (task / "children").read_text().split()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("number", [0, 1, 3])
def test_closing_leaves_no_thread_and_no_process(loader, number):
    take(1, golden_stream(64), loader=loader)  # DALI keeps a thread or two for the whole process
    before, others = threads(), children()  # the gloo ranks of other tests
    for _ in range(3):
        take(number, golden_stream(64), loader=loader)
    wait_for(lambda: threads() <= before)  # a joined thread may still be on its way out
    assert children() == others


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_stays_as_it_is(loader):
    """Through later batches and the end of the loader, although its memory may be the loader's."""
    batches = open_batches(golden_stream(), 0, device=CPU, loader=loader, threads=1)
    first, identities, *_ = next(batches)
    copies = first.clone(), identities.clone()
    for _ in range(6):
        next(batches)
    batches.close()
    assert torch.equal(first, copies[0])
    assert torch.equal(identities, copies[1])


def test_without_dali_auto_is_torch_and_dali_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "partialfc.data.loaders.dali", None)
    [(images, _)] = take(1, golden_stream(), loader="auto")
    np.testing.assert_array_equal(images, take(1, golden_stream())[0][0])
    with pytest.raises(ValueError, match=r'data.loader = "dali" needs NVIDIA DALI.*"torch"'):
        take(1, golden_stream(), loader="dali")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"threads": 0}, "data.threads must be >= 1, got 0"),
        ({"prefetch": 0}, "data.prefetch must be >= 1, got 0"),
        ({"samples_seen": -1}, "samples_seen must be >= 0, got -1"),
    ],
)
def test_impossible_settings_are_refused_before_the_first_batch(setting, message):
    with pytest.raises(ValueError, match=message):
        open_batches(golden_stream(), **{"samples_seen": 0, "device": CPU} | setting)


def test_a_stream_checks_its_order_against_the_pack_and_the_ranks():
    dataset = open_dataset([GOLDEN])
    some = {"dataset": dataset, "augmentation": Augmentation(), "image_size": 112}
    with pytest.raises(ValueError, match="order is of 59 images, must be of the 60"):
        Stream(order=Order(59, 12, seed=5), **some)
    with pytest.raises(ValueError, match=r"data.global_batch must be a multiple of the 5 ranks"):
        Stream(order=Order(60, 12, seed=5), world_size=5, **some)


def test_images_go_to_a_gpu_from_pinned_memory(monkeypatch):
    """A copy from other memory waits for all that the GPU was given; identities stay here."""
    threads, sent = [], []

    def pin_memory(images):
        threads.append(threading.current_thread().name)
        return images

    def to(images, device, non_blocking=False):
        sent.append((device.type, non_blocking))
        return images

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = torch.device("cuda")
    with contextlib.closing(
        torch_batches(golden_stream(batch=4), 0, device=gpu, threads=1, prefetch=1)
    ) as batches:
        batch = next(batches)
    assert threads[0].startswith("batch"), "the thread of training would copy them"
    assert sent == [("cuda", True)]
    assert batch.identities.device == CPU
