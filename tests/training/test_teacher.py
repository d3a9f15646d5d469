"""A run that learns from a teacher: of every kind, resumed to the last bit, on 1 and 2 ranks."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save_file

from partialfc.checkpoint.folder import read_manifest
from partialfc.checkpoint.teacher import Teacher, open_teacher
from partialfc.commands import embed
from partialfc.config import Config, ConfigError, load
from partialfc.data.dataset import open_dataset
from partialfc.data.images.formats import decode_image
from partialfc.data.loaders.torch_loader import normalise
from partialfc.errors import CheckpointError
from partialfc.model.step import train_step
from partialfc.runtime.process import running
from partialfc.training.run import train
from tests.support.models import batch, flat_model, runtime, settings, share
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, losses, run, words

SMALL = ("backbone.embedding_dim=16", "head.optimizer.unsampled=stay", *UNVERIFIED)


def config_of(packs, folder, *overrides) -> Config:
    _, path, *rest = words(packs, folder, *SMALL, *overrides)
    return load(path, rest)


def trained(packs, folder, *overrides):
    """Train in this process; return the losses and the backbone."""
    config = config_of(packs, folder, *overrides)
    with running(config) as here:
        train(config, here)
    newest = max((folder / "checkpoints").iterdir())
    return losses(folder), load_file(newest / "backbone.safetensors")


@pytest.fixture(scope="module")
def teacher(packs, tmp_path_factory):
    """A run of two steps; what it knows does not matter here."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    trained(packs, folder, "run.steps=2", "schedule.warmup_steps=1")
    return folder


def taught_by(place, *more):
    return (f"losses.teacher.from={place}", "losses.teacher.weight=3", *more)


def test_a_resume_goes_on_with_the_same_teacher_and_refuses_another(packs, teacher, tmp_path):
    """Losses and weights to the last bit, with a weight that falls; the teacher may have moved."""
    falls = "losses.teacher.final_factor=0.5"
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    half = ("checkpoint.every_steps=3", "run.steps=6")
    straight = trained(packs, tmp_path / "whole", *taught_by(teacher, falls, *half))
    records = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all("loss_teacher" in json.loads(line) for line in records if "throughput" in line)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step_00000006")
    (cut / "summary.json").unlink()
    resumed = trained(packs, cut, *taught_by(moved, falls, *half))
    assert straight[0] == resumed[0]
    assert all(torch.equal(value, resumed[1][name]) for name, value in straight[1].items())

    state = load_file(teacher / "checkpoints" / "step_00000002" / "backbone.safetensors")
    name = next(iter(state))
    state[name] = state[name] * 1.5
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"losses\.teacher = .*digest"):
        trained(packs, cut, *taught_by(tmp_path / "other.safetensors", falls, "run.steps=8"))
    with pytest.raises(CheckpointError, match=r"losses\.teacher = .*this run has null"):
        trained(packs, cut, "run.steps=8")


def test_a_run_without_a_teacher_goes_on_from_checkpoints_of_before_there_were_any(packs, teacher):
    facts = read_manifest(teacher / "checkpoints" / "step_00000002")["facts"]
    assert facts["losses.teacher"] is None, "as a fact that is missing"
    assert set(facts["losses"]) == {"triplet", "contrastive", "uniformity", "center", "inter_class"}


def steps_on_rank(rank, world_size, form, accumulation):
    """Three steps of a network without BatchNorm; the teacher's embedding of sample i is row i."""
    optimizer = {"name": "sgd", "accumulation": accumulation}
    teaches = {"weight": 5.0, "from": "unused", "form": form}
    config = settings(optimizer=optimizer, losses={"teacher": teaches})
    model = flat_model(config)
    rows = torch.randn(100, 16, generator=torch.Generator().manual_seed(3))
    seen = Teacher(lambda images, sample_ids: rows[sample_ids], 16, "0" * 16)
    values = []
    for step in range(3):
        images, identities = (share(part, rank, world_size) for part in batch(step, 24))
        sample_ids = share(np.arange(24) + 7 * step, rank, world_size)
        lesson_of = seen.lessons(sample_ids, 1.0)
        done = train_step(model, config, images, identities, 0.05, lesson_of)
        values.append((done.loss.item(), done.terms["teacher"].item()))
    return values, model.backbone.project.weight.detach().numpy()


@pytest.mark.distributed
@pytest.mark.parametrize(("form", "accumulation"), [("cosine", 3), ("relational", 1)])
def test_ranks_and_micro_batches_do_not_change_what_is_taught(form, accumulation):
    """Each micro-batch of each rank must get the rows of its own samples."""
    alone = steps_on_rank(0, 1, form, 1)
    assert alone[0][0][1] > 0.01
    for result in run_on_ranks(2, steps_on_rank, form, accumulation):
        np.testing.assert_allclose(result[0], alone[0], rtol=1e-5)
        np.testing.assert_allclose(result[1], alone[1], rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_on_two_ranks_learns_from_embeddings_made_beforehand(packs, teacher, tmp_path):
    """torchrun, loaders and the file together; BatchNorm sees half a batch, so it is not equal."""
    out = tmp_path / "taught.npy"
    assert embed.main([str(teacher), str(packs / "train.rec"), "--out", str(out)]) == 0
    wanted = (*SMALL, *taught_by(out, "losses.teacher.form=margin", "run.steps=4"))
    for name, ranks in (("one", None), ("two", 2)):
        done = run(packs, tmp_path / name, *wanted, "data.images_per_identity=2", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss_teacher"]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=0.2)


def opened(packs, place, *overrides):
    config = config_of(packs, place.parent / "unused", *taught_by(place, *overrides))
    return open_teacher(config, open_dataset(config.data.train), runtime())


def test_a_backbone_teaches_in_evaluation_mode_what_embed_writes(packs, teacher, tmp_path):
    """The same embeddings by sample from an .npy: of unchanged images, without the mirrored one."""
    out = tmp_path / "taught.npy"
    words_of_it = [str(teacher), str(packs / "train.rec"), "--out", str(out), "--no-flip"]
    assert embed.main(words_of_it) == 0
    network, vectors = opened(packs, teacher), opened(packs, out)
    dataset = open_dataset([packs / "train.rec"])
    samples = np.array([17, 3, 799, 3])
    images = torch.empty(4, 3, 32, 32)
    for place, sample in enumerate(samples.tolist()):
        normalise(decode_image(dataset.jpeg_view(sample)), images[place].numpy())
    lesson = network.lessons(samples, 0.5)(images, slice(0, 4))
    assert (lesson.factor, lesson.embeddings_bL.requires_grad) == (0.5, False)
    found = vectors.lessons(samples, 1.0)(images[1:3], slice(1, 3)).embeddings_bL
    assert torch.allclose(lesson.embeddings_bL[1:3], found, atol=1e-4)
    assert (network.dim, vectors.dim) == (16, 16)
    assert network.digest != vectors.digest


def test_what_does_not_fit_the_run_is_refused(packs, teacher, tmp_path):
    with pytest.raises(ConfigError, match="it must see the same images"):
        opened(packs, teacher, "data.image_size=48")
    with pytest.raises(ConfigError, match=r"backbone\.embedding_dim = 32: must be the 16"):
        opened(packs, teacher, "backbone.embedding_dim=32")
    with pytest.raises(ConfigError, match=r"losses\.teacher\.from: .*nowhere"):
        opened(packs, tmp_path / "nowhere.safetensors")


def onnx_file(path, *, inside=False, batch="batch", size=32):
    """A matrix as a model, with or without the normalisation of pixels in it."""
    pixels = [3, size, size]
    weight = np.random.default_rng(0).standard_normal((3 * size * size, 5)).astype(np.float32)
    held = {"w": weight, "low": np.float32(127.5), "by": np.float32(1 / 127.5)}
    nodes = [helper.make_node("Flatten", ["y" if inside else "x"], ["z"], name="flat")]
    nodes += [helper.make_node("MatMul", ["z", "w"], ["out"], name="product")]
    if inside:
        sub = helper.make_node("Sub", ["x", "low"], ["d"], name="Sub_0")
        nodes = [sub, helper.make_node("Mul", ["d", "by"], ["y"], name="Mul_1"), *nodes]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *pixels])],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [batch, 5])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path, weight


@pytest.mark.parametrize("inside", [False, True])
def test_an_onnx_file_teaches_from_images_as_it_wants_them(packs, tmp_path, inside):
    """insightface's rule: a Sub and a Mul among the first nodes take pixels from 0 to 255."""
    path, weight = onnx_file(tmp_path / "teacher.onnx", inside=inside)
    teacher = opened(packs, path, "losses.teacher.form=relational")
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    found = teacher.lessons(np.arange(4), 1.0)(images, slice(0, 4)).embeddings_bL
    assert teacher.dim == 5
    assert torch.allclose(found, images.flatten(1) @ torch.from_numpy(weight), atol=1e-3)


def test_an_onnx_file_of_another_size_or_of_one_image_is_refused(packs, tmp_path):
    for number, wrong in enumerate(({"size": 48}, {"batch": 1})):
        path, _ = onnx_file(tmp_path / f"{number}.onnx", **wrong)
        with pytest.raises(ConfigError, match=r"losses\.teacher\.from: .*it cannot run on"):
            opened(packs, path, "losses.teacher.form=relational")
