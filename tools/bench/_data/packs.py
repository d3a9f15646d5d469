"""The packs that tools/bench/data.py reads: faces to decode, and one of 42 million records."""

import tarfile
from bisect import bisect_left
from io import BytesIO
from pathlib import Path

import numpy as np

from partialfc.data.images.jpeg import encode
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.recordio import MAGIC, PART_HEADER, RECORD_HEADER
from partialfc.data.packs.writer import PackWriter, write_insightface_pack

IMAGES, IDENTITIES = 42_474_557, 2_059_906
"""Of WebFace42M."""
_GAP = 4096
_DISTINCT = 512
_IN_SHARD = 3000


def write_faces(path: Path, images: int) -> None:
    """Write a plain pack of 112 x 112 faces at quality 95; the same few hundred again and again."""
    from tools._faces.packs import render  # it needs packages that the other parts do without

    jpegs = []
    for start in range(0, _DISTINCT, 64):
        ids = np.arange(start, start + 64)
        jpegs += [encode(face) for face in render(ids, ids, seed=1, size=112)]
    with PackWriter(path) as writer:
        for key in range(images):
            writer.write(key, key % _DISTINCT, jpegs[key * 7919 % _DISTINCT])


def write_sorted(path: Path, pack: Path) -> None:
    """Write the images of a pack as InsightFace does: it opens without a look at its images."""
    images = open_pack(pack)
    count = len(images)
    samples = ((i * _DISTINCT // count, images.jpeg(i)) for i in range(count))
    write_insightface_pack(path, samples, _DISTINCT)


def write_files(pack: Path, folder: Path) -> None:
    """Write the images of a pack as files, a folder for each identity."""
    images = open_pack(pack)
    for image in range(len(images)):
        identity, jpeg = images.record(image)
        (folder / f"{identity:03d}").mkdir(parents=True, exist_ok=True)
        (folder / f"{identity:03d}" / f"{image:08d}.jpg").write_bytes(jpeg.tobytes())


def write_shards(pack: Path, folder: Path) -> None:
    """Write the images of a pack as tar shards of about 30 MB, each with its identity beside it."""
    images = open_pack(pack)
    folder.mkdir(parents=True)
    for start in range(0, len(images), _IN_SHARD):
        with tarfile.open(folder / f"{start // _IN_SHARD:04d}.tar", "w") as tar:
            for image in range(start, min(start + _IN_SHARD, len(images))):
                identity, jpeg = images.record(image)
                for end, content in (("jpg", jpeg.tobytes()), ("cls", str(identity).encode())):
                    info = tarfile.TarInfo(f"{image:08d}.{end}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))


def write_huge(folder: Path) -> None:
    """Write an InsightFace pack as large as WebFace42M, with holes where its images would be.

    Its index and its records of identities are whole; of the images only the few headers exist
    that opening it looks at.
    """
    end = _GAP * (IMAGES + 1)
    identity = np.zeros(
        IDENTITIES,
        [("magic", "<u4"), ("length", "<u4"), ("flag", "<u4"), ("label", "<f4"),
         ("key", "<u8"), ("zero", "<u8"), ("range", "<f4", 2)],
    )  # fmt: skip
    identity["magic"], identity["length"], identity["flag"] = MAGIC, RECORD_HEADER.size + 8, 2
    identity["key"] = np.arange(IMAGES + 1, IMAGES + 1 + IDENTITIES)
    probed: list[int] = []

    def is_identity(record: int) -> bool:
        probed.append(record)
        return record > IMAGES

    bisect_left(range(IMAGES + 1 + IDENTITIES), True, lo=1, key=is_identity)
    with (folder / "train.rec").open("wb") as file:
        ends = np.array([IMAGES + 1, IMAGES + 1 + IDENTITIES], "<f4").tobytes()
        file.write(PART_HEADER.pack(MAGIC, RECORD_HEADER.size + 8) + RECORD_HEADER.pack(2, 0, 0, 0))
        file.write(ends)
        for key in probed:
            if key <= IMAGES:
                file.seek(_GAP * key)
                file.write(PART_HEADER.pack(MAGIC, _GAP - 96) + RECORD_HEADER.pack(0, 0, key, 0))
        file.seek(end)
        file.write(identity.tobytes())
    count = IMAGES + 1 + IDENTITIES
    with (folder / "train.idx").open("w", encoding="utf-8") as lines:
        for start in range(0, count, 1 << 20):
            keys = np.arange(start, min(start + (1 << 20), count))
            place = keys - IMAGES - 1
            offset = np.where(place < 0, keys * _GAP, end + place * identity.itemsize)
            pairs = zip(keys.tolist(), offset.tolist(), strict=True)
            lines.write("".join(f"{k}\t{o}\n" for k, o in pairs))
