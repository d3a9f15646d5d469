"""What class centers begin with: files of every precision, and the mean of each one's images."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from partialfc import ArcFace, PartialFC, Precision
from partialfc.checkpoint.warm_start import write_start
from partialfc.commands._estimate.head import head_parts, shard_of
from partialfc.commands._estimate.start import refuse_other_centers
from partialfc.config import ConfigError, load
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.images.formats import decode_image
from partialfc.data.loaders.torch_loader import normalise
from partialfc.data.tars.store import ShardError
from partialfc.evaluation.means import Reading
from partialfc.evaluation.sets import Evaluation
from partialfc.head.centers import stored_centers
from partialfc.margins import MARGINS
from partialfc.model.build import build, new_backbone
from partialfc.runtime.process import running
from partialfc.training import start
from partialfc.training.images import numberings, open_images
from partialfc.training.run import train
from tests.support.models import runtime, settings
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, losses, words

C, D = 45, 6
SMALL = ("backbone.embedding_dim=16", "data.image_size=32", *UNVERIFIED)


def directions(dtype=torch.float32):
    """Rows of any length; that of identity 7 has no direction."""
    row_CD = torch.randn(C, D, generator=torch.Generator().manual_seed(3)) * 40
    row_CD[7] = 0
    return row_CD.to(dtype)


def write(folder, ending, dtype):
    path = folder / f"{str(dtype).removeprefix('torch.')}{ending}"
    if ending == ".npy":
        np.save(path, directions(dtype).numpy())
    else:
        save_file({"centers": directions(dtype), "other": torch.zeros(3)}, path)
    return path


def begun(rank, world_size, path, margin=None, center_format="fp32"):
    """The centers of a rank of a new head, and the settings that say so."""
    config = settings(head={"start": str(path)})
    precision = Precision(center_format=center_format)
    head = PartialFC(C, D, margin or ArcFace(), precision=precision, canonical_shards=4)
    start.begin_centers(config, runtime(), SimpleNamespace(heads={"": head}), None, None)
    return head.centers.detach().clone()


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [
        (".npy", torch.float16),
        (".npy", torch.float32),
        (".npy", torch.float64),
        (".safetensors", torch.bfloat16),
        (".safetensors", torch.float16),
        (".safetensors", torch.float32),
    ],
)
@pytest.mark.distributed
def test_a_file_gives_the_same_bits_on_any_number_of_ranks(ending, dtype, tmp_path, monkeypatch):
    """Directions are the file's, lengths those of random centers; no direction, no change."""
    path = write(tmp_path, ending, dtype)
    alone = begun(0, 1, path)
    assert torch.equal(alone, torch.cat(run_on_ranks(2, begun, path)))
    row_CD = directions(dtype).double()
    expected = row_CD / row_CD.norm(dim=1, keepdim=True) * 0.01 * math.sqrt(D)
    expected[7] = PartialFC(C, D, ArcFace()).centers[7]
    assert torch.equal(alone, expected.float())
    monkeypatch.setattr("partialfc.checkpoint.center_file.PIECE_BYTES", 8 * D * 4)
    assert torch.equal(alone, begun(0, 1, path)), "in pieces of four rows"


@pytest.mark.parametrize("center_format", ["bf16", "fp16"])
def test_centers_of_fewer_bits_are_the_nearest(center_format, tmp_path):
    path = write(tmp_path, ".npy", torch.float32)
    few = begun(0, 1, path, center_format=center_format)
    assert torch.equal(few, begun(0, 1, path).to(few.dtype))


def test_fp8_centers_begin_at_the_nearest_with_room_for_an_axis(tmp_path):
    """Of one scale for all, an axis were beyond the largest number, and a small element nothing."""
    row_CD = directions().numpy()
    row_CD[3], row_CD[4] = np.eye(D)[3] * -2, np.logspace(0, -6, D)
    np.save(tmp_path / "a.npy", row_CD)
    config = settings(head={"start": str(tmp_path / "a.npy")})
    few, plain = (
        PartialFC(C, D, ArcFace(), precision=Precision(center_format=stored))
        for stored in ("fp8", "fp32")
    )
    for head in (few, plain):
        start.begin_centers(config, runtime(), SimpleNamespace(heads={"": head}), None, None)
    found_CD = stored_centers(few.centers, few.optimizer.states())
    least_C1 = plain.centers.abs().amax(1, keepdim=True) * 2.0**-17
    assert ((found_CD - plain.centers).abs() <= plain.centers.abs() * 2.0**-4 + least_C1).all()


def test_of_several_centers_the_first_begins_there(tmp_path):
    """The others must differ from it, or no image is ever nearer to one of them."""
    path = write(tmp_path, ".npy", torch.float32)
    margin = MARGINS["subcenter_arcface"](sub_centers=3)
    found = begun(0, 1, path, margin).view(C, 3, D)
    fresh = PartialFC(C, D, margin).centers.view(C, 3, D)
    has = torch.arange(C) != 7
    assert torch.equal(found[has, 0], begun(0, 1, path)[has])
    assert torch.equal(found[:, 1:], fresh[:, 1:])


def bad_row(path):
    row_CD = directions()
    row_CD[40, 2] = math.nan
    np.save(path, row_CD.numpy())


def cut_short(path):
    np.save(path, directions().numpy())
    path.write_bytes(path.read_bytes()[:-4])


def says_too_much(path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 6), }" % (1 << 62)
    header += b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("a.npy", bad_row, "row 40 has the length nan; it must be finite"),
        ("a.npy", cut_short, "mmap length is greater|its header says"),
        ("a.npy", says_too_much, r"is no \.npy file of numbers"),
        ("a.npy", lambda p: np.save(p, np.ones((C - 1, D), "f4")), r"\[44, 6\], and must have one"),
        ("a.npy", lambda p: np.save(p, np.ones((C, D), "i8")), r"int64 \[45, 6\], must be fp16"),
        ("a.npy", lambda p: np.save(p, np.ones((C, D), ">f4")), "must be fp16 or fp32 or fp64"),
        ("a.npy", lambda p: np.save(p, np.ones((D, C), "f4").T), "row by row"),
        ("a.npy", lambda p: p.write_bytes(b""), "damaged|magic|No data"),
        ("a.npy", lambda p: None, "No such file"),
        ("a.safetensors", lambda p: p.write_bytes(b"{" * 40), "damaged"),
        (
            "a.safetensors",
            lambda p: save_file({"a": torch.ones(2), "b": torch.ones(2)}, p),
            "2 tensors, none of them named centers",
        ),
        (
            "a.safetensors",
            lambda p: save_file({"a": torch.ones(C, D, 1)}, p),
            r"a is F32 \[45, 6, 1\], must be fp64",
        ),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_name(name, spoil, message, tmp_path):
    path = tmp_path / name
    spoil(path)
    with pytest.raises(ConfigError, match=rf"(?s)head\.start = .*{name}.*({message})"):
        begun(0, 1, path)


def refusal(rank, world_size, path):
    try:
        begun(rank, world_size, path)
    except ConfigError as error:
        return str(error)


@pytest.mark.distributed
def test_a_bad_row_of_one_rank_ends_all_of_them(tmp_path):
    bad_row(tmp_path / "a.npy")
    first, second = run_on_ranks(2, refusal, tmp_path / "a.npy")
    assert first == second
    assert "row 40" in first


def config_of(packs, folder, *overrides):
    _, path, *rest = words(packs, folder, *SMALL, *overrides)
    return load(path, rest)


WITHOUT, SPOILED = 3, 100
"""An identity all of whose images are left out, and a sample that cannot be decoded."""


def spoiled(packs):
    whole = open_dataset([packs / "train.rec"])
    dataset = DataSet(whole.packs, [np.flatnonzero(whole.labels() == WITHOUT)])
    view = dataset.jpeg_view
    dataset.jpeg_view = lambda sample: view(sample)[: 50 if sample == SPOILED else None]
    return dataset


def mean_begun(rank, world_size, packs, folder):
    """Centers of a rank at the mean of images, 320 at a time, and its backbone."""
    torch.manual_seed(5)
    config = config_of(packs, folder, "head.start=pack:mean", "precision.compute=fp32")
    dataset = spoiled(packs)
    model = build(config, runtime(), dataset.num_identities)
    evaluation = Evaluation(config, runtime())
    start._SAMPLES = 320
    start.begin_centers(config, runtime(), model, dataset, evaluation)
    return model.head.centers.detach().clone(), model.backbone.state_dict()


@pytest.mark.distributed
def test_the_mean_of_images_is_the_same_bits_on_any_number_of_ranks(packs, tmp_path):
    """An image that cannot be used counts in no mean; without an image a center stays random."""
    (alone, state), *_ = run_on_ranks(1, mean_begun, packs, tmp_path)
    both = run_on_ranks(2, mean_begun, packs, tmp_path)
    assert torch.equal(alone, torch.cat([centers for centers, _ in both]))

    config, dataset = config_of(packs, tmp_path), spoiled(packs)
    backbone = new_backbone(config).eval()
    backbone.load_state_dict(state)
    good = [i for i in range(len(dataset)) if i != SPOILED]
    images = torch.empty(len(good), 3, 32, 32)
    for i, image in zip(good, images, strict=True):
        normalise(decode_image(dataset.jpeg_view(i), 32), image.numpy())
    with torch.no_grad():
        row_ND = backbone(images).double()
        if config.verification.flip:
            row_ND += backbone(images.flip(3)).double()
    unit_ND = row_ND / row_ND.norm(dim=1, keepdim=True)
    identity_N = torch.from_numpy(dataset.identities(good))
    sum_CD = torch.zeros(len(alone), 16, dtype=torch.float64).index_add_(0, identity_N, unit_ND)
    expected = sum_CD / sum_CD.norm(dim=1, keepdim=True) * 0.01 * 4
    random = PartialFC(len(alone), 16, ArcFace(), seed=config.run.seed).centers
    expected[WITHOUT] = random[WITHOUT]
    assert (alone - expected).abs().max() < 1e-6


def test_a_mean_is_over_all_images_that_name_an_identity(packs, tmp_path):
    """With labels of one's own: -1 names none, twice is once, and weights are added."""
    whole = open_dataset([packs / "train.rec"])
    labels = np.full((len(whole), 3), -1)
    labels[2], labels[4] = (7, 1, 7), (1, -1, -1)
    np.save(tmp_path / "labels.npy", labels)
    np.save(tmp_path / "weights.npy", np.where(labels < 0, 0, 0.5).astype(np.float32))
    sample_n, found = np.array([2, 3, 4]), []
    for weights in (None, tmp_path / "weights.npy"):
        own = {"labels": tmp_path / "labels.npy", "weights": weights}
        pairs = zip(
            *start._pairs(open_dataset([packs / "train.rec"], **own), sample_n), strict=True
        )
        summed = {}
        for place, identity, weight in pairs:
            if identity >= 0:
                summed[place, identity] = summed.get((place, identity), 0) + weight
        found.append(summed)
    assert found[0] == {(0, 1): 1, (0, 7): 1, (2, 1): 1}
    assert found[1] == {(0, 1): 0.5, (0, 7): 1, (2, 1): 0.5}


def test_a_damaged_record_takes_its_own_pairs_alone(packs, tmp_path):
    """With several labels an image the whole start failed, with a stack trace."""
    dataset = open_dataset([packs / "train.rec"])
    identities = dataset.identities

    def some(samples):
        if 3 in np.asarray(samples):
            raise ValueError("image 3: it is cut")
        return np.stack([identities(samples)] * 2, 1)

    dataset.identities = some
    of_n, identity_n, weight_n = start._pairs(dataset, np.array([2, 3, 4]))
    assert of_n.tolist() == [0, 2]
    assert identity_n.tolist() == identities([2, 4]).tolist()
    assert weight_n.tolist() == [1, 1]
    assert all(not len(one) for one in start._pairs(dataset, np.array([3, 3])))


def test_a_store_that_is_down_ends_the_start(packs):
    """Its images were counted as unusable, and the centers of whole shards stayed random."""
    dataset = open_dataset([packs / "train.rec"])

    def lost(_):
        raise ShardError("a.tar: it gives no answer")

    dataset.jpeg_view = lost
    with pytest.raises(ShardError):
        Reading(dataset.jpeg_view, np.array([2]), 32)(0)


def test_each_head_begins_at_the_mean_of_its_own_images(packs, tmp_path, monkeypatch):
    """As if it were alone, and the other head stays random; not all pieces have images of it."""
    monkeypatch.setattr(start, "_SAMPLES", 320)
    sets = "".join(
        f"{name}={{train='{packs / pack}', images=12}}, "
        for name, pack in (("letters", "train.rec"), ("others", "heldout.rec"))
    )
    several = ("data.train=", f"data.sets={{{sets[:-2]}}}", "heads.letters={}")
    several = (*several, "heads.others.start=pack:mean", "head=")
    alone = (f"data.train={packs / 'heldout.rec'}", "head.start=pack:mean")
    found, state = [], None
    for words_of in (several, alone):
        config = config_of(packs, tmp_path, *words_of)
        dataset = open_images(config)
        model = build(config, runtime(), numberings(config, dataset))
        state = state or model.backbone.state_dict()
        model.backbone.load_state_dict(state)
        before = {name: head.centers.detach().clone() for name, head in model.heads.items()}
        start.begin_centers(config, runtime(), model, dataset, Evaluation(config, runtime()))
        found.append({name: head.centers.detach() for name, head in model.heads.items()})
        assert "letters" not in before or torch.equal(before["letters"], found[0]["letters"])
    assert found[0]["others"].shape == found[1][""].shape
    assert (found[0]["others"] - found[1][""]).abs().max() < 1e-6


def trained(packs, folder, *overrides):
    """Train in this process; return the losses and the centers at the end."""
    config = config_of(packs, folder, *overrides)
    with running(config) as here:
        train(config, here)
    newest = max((folder / "checkpoints").iterdir())
    (centers,) = newest.glob("centers_*.safetensors")
    return losses(folder), load_file(centers)["centers"]


@pytest.mark.slow
def test_it_counts_in_a_new_run_only(packs, tmp_path):
    """A run that goes on needs no file; with a start from a backbone alone it counts."""
    count = open_dataset([packs / "train.rec"]).num_identities
    np.save(tmp_path / "a.npy", np.eye(count, 16, dtype=np.float32) + 0.1)
    words = ("checkpoint.every_steps=2", "run.steps=4", "schedule.warmup_steps=1")
    words = (f"head.start={tmp_path / 'a.npy'}", *words)
    straight = trained(packs, tmp_path / "whole", *words)
    assert straight[0] != trained(packs, tmp_path / "random", *words[1:])[0]
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000004")
    (cut / "summary.json").unlink()
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    resumed = trained(packs, cut, *words)
    assert straight[0] == resumed[0]
    assert torch.equal(straight[1], resumed[1])
    backbone = (f"run.start_from={tmp_path / 'random'}", "run.steps=1", "optimizer.lr=1e-30")
    still = (*words[1:2], "schedule.warmup_steps=0", *backbone, f"head.start={tmp_path / 'b.npy'}")
    _, centers = trained(packs, tmp_path / "fine", *still)
    row_CD = torch.eye(count, 16, dtype=torch.float64) + torch.tensor(0.1).double()
    expected = row_CD / row_CD.norm(dim=1, keepdim=True) * 0.04
    assert (centers - expected).abs().max() < 1e-7


def test_two_starts_of_the_centers_are_refused(packs, tmp_path):
    """A folder of partialfc identities has centers, of grown identities too."""
    about = {"num_identities": 3, "centers_per_identity": 1}
    write_start(tmp_path / "start", {"a": torch.ones(1)}, torch.ones(3, 16), about)
    words = (f"run.start_from={tmp_path / 'start'}", "head.start=pack:mean", "run.steps=3")
    with pytest.raises(ConfigError, match=r"head\.start = \"pack:mean\" with run\.start_from"):
        trained(packs, tmp_path / "run", *words)


def test_the_setting_takes_words_and_files_only(packs, tmp_path):
    with pytest.raises(ConfigError, match=r'head\.start = "mean": must be .*mean "pack:mean"'):
        config_of(packs, tmp_path, "head.start=mean")
    assert config_of(packs, tmp_path).head.start == "random"
    assert config_of(packs, tmp_path, "head.start=a.npy").head.start_file.is_absolute()


def test_estimate_counts_it_and_refuses_a_file_that_does_not_fit(packs, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((44, 16), "f4"))
    config = config_of(packs, tmp_path, f"head.start={tmp_path / 'a.npy'}")
    with pytest.raises(ConfigError, match=r"head\.start = .*\[44, 16\]"):
        refuse_other_centers(config, 45)
    refuse_other_centers(config, 44)
    for start_from, size in (("pack:mean", 23 * 16 * 4), (tmp_path / "a.npy", 23 * 16 * 8 * 3)):
        config = config_of(packs, tmp_path, f"head.start={start_from}", "head.canonical_shards=2")
        parts = head_parts(config, shard_of(config, 45, 2, "cpu"), 2, "cpu")
        assert parts[-1].bytes == (0, 0, 0, size)
