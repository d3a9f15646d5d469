"""A backbone divided among the ranks is trained, measured and saved as one that each has whole."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.backbones import build_backbone
from partialfc.backbones.vit import VisionTransformer, ViTShape
from partialfc.checkpoint import loading as checkpoint
from partialfc.config import Config, ConfigError
from partialfc.model import fsdp
from partialfc.model.batch_norm import statistics
from partialfc.model.build import Model, assemble
from partialfc.model.fsdp import Shards, blocks_of, rows_of
from partialfc.model.optimizer import groups_in_words
from partialfc.model.step import train_step
from tests.support.models import batch, runtime, settings, share
from tests.support.processes import python
from tests.support.ranks import run_on_ranks
from tests.support.runs import losses, run

FACTS = {"seed": 2048}
SIZE, DIM = 24, 16
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}


def config_of(shard: str, **sections) -> Config:
    backbone = {"shard": shard, **sections.pop("backbone", {})}
    if shard == "none":
        backbone.pop("reshard", None)
    optimizer = {**ADAMW, **sections.pop("optimizer", {})}
    return settings(backbone=backbone, optimizer=optimizer, **sections)


def vit(*, checkpoint_activations=False) -> nn.Module:
    """Drop path and masks draw random numbers; rows of the positions are fewer than the ranks."""
    return VisionTransformer(
        ViTShape(width=32, depth=2),
        masked=0.1,
        drop_path=0.2,
        embedding_dim=DIM,
        image_size=SIZE,
        checkpoint_activations=checkpoint_activations,
    )


def model_of(config: Config) -> Model:
    torch.manual_seed(3)
    recompute = config.backbone.checkpoint_activations
    if config.backbone.name == "convnet_s":  # BatchNorm, in channels_last without shards
        backbone = build_backbone("convnet_s", embedding_dim=DIM, image_size=32)
    else:
        backbone = vit(checkpoint_activations=recompute)
    head = PartialFC(40, DIM, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
    return assemble(config, runtime(), backbone, head)


def take(model: Model, config: Config, steps, rank: int, world_size: int):
    """Loss and gradient norm of each step."""
    found = []
    for step in steps:
        size = 32 if config.backbone.name == "convnet_s" else SIZE
        images, identities = batch(step, 24, size=size)
        own = share(images, rank, world_size), share(identities, rank, world_size)
        done = train_step(model, config, *own, 1e-3)
        found.append((done.loss.item(), done.gradient_norm.item()))
    return found


def both_on_rank(rank, world_size, steps, cases):
    found = []
    for case in cases:
        runs = []
        for shard in ("none", "fsdp2"):
            config = config_of(shard, **case)
            runs.append(take(model_of(config), config, range(steps), rank, world_size))
        found.append(runs)
    return found


CASES = [
    {"optimizer": {"accumulation": 2, "clip_norm": 0.5}},
    {
        "backbone": {"checkpoint_activations": True, "reshard": False, "ema": 0.9},
        "precision": {"compute": "bf16"},
        "optimizer": {"clip_norm": 0.0},
    },
]


def assert_equal_runs(world_size, steps, cases, later=1e-6):
    """To 1e-6 for twenty steps, and to ``later`` from there on."""
    results = run_on_ranks(world_size, both_on_rank, steps, cases)
    assert all(result == results[0] for result in results[1:]), "ranks differ"
    for case, (whole, divided) in zip(cases, results[0], strict=True):
        assert len(set(whole)) == steps, "it learns"
        losses_of, norms_of = zip(*whole, strict=True)
        divided_losses, divided_norms = zip(*divided, strict=True)
        for values, divided_values in ((losses_of, divided_losses), (norms_of, divided_norms)):
            assert divided_values[:20] == pytest.approx(values[:20], rel=1e-6), case
            assert divided_values[20:] == pytest.approx(values[20:], rel=later), case


@pytest.mark.distributed
def test_losses_and_norms_are_those_of_ddp():
    """Accumulated, clipped, recomputed, kept gathered: the same update in other places."""
    assert_equal_runs(2, 4, CASES)


@pytest.mark.distributed
@pytest.mark.slow
def test_groups_frozen_parts_and_other_optimizers_go_with_it():
    frozen = {
        "backbone": {"freeze": ["patch_embed", "blocks.0"]},
        "optimizer": {"name": "lion", "layer_decay": 0.8, "clip_groups": True, "clip_norm": 0.1},
    }
    free = {
        "optimizer": {"name": "schedule_free"},
        "schedule": {"name": "linear", "final_factor": 1.0},
    }
    sgd = {"optimizer": {"name": "sgd", "decay": "matrices"}}
    assert_equal_runs(2, 4, [frozen, free, sgd])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "clip_norm"), [(2, 0.5), (4, 0.0)])
def test_fifty_losses_are_those_of_ddp(world_size, clip_norm):
    """On 4 ranks gloo sums the gradients themselves in another order for FSDP2, and AdamW makes
    more of their last bit from step to step: how much depends on the CPU."""
    later = 1e-6 if world_size == 2 else 5e-5
    assert_equal_runs(world_size, 50, [{"optimizer": {"clip_norm": clip_norm}}], later)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_network_of_convolutions_and_batch_norm_trains_as_under_ddp():
    """Its statistics are each rank's own, and rows of a kernel are cut where torch has channels."""
    convnet = {"backbone": {"name": "convnet_s", "channels_last": False}}
    sgd = {**convnet, "optimizer": {"name": "sgd", "lr": 0.05, "clip_norm": 0.5}}
    assert_equal_runs(2, 20, [convnet, sgd])


def poisoned_on_rank(rank, world_size):
    class Poisoned(Shards):
        def take_gradients(self):
            super().take_gradients()
            if rank == 0:  # whose rows alone the positions are
                self.own["pos_embed"].grad.fill_(math.inf)

    config = config_of("fsdp2")
    model = model_of(config)
    take(model, config, range(2), rank, world_size)
    before = everything(model)
    fields = {one.name: getattr(model.shards, one.name) for one in dataclasses.fields(Shards)}
    bad = dataclasses.replace(model, shards=Poisoned(**fields))
    images, identities = (share(part, rank, world_size) for part in batch(2, 24, size=SIZE))
    done = train_step(bad, config, images, identities, 1e-3)
    same = all(map(torch.equal, everything(model), before))
    return done.skipped.item(), same, len(model.shards.own["pos_embed"])


def everything(model: Model):
    """What the rank has of weights, statistics and states of the backbone."""
    states = [value for state in model.optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters().values(), *statistics(model.backbone).values(), *states]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.distributed
def test_what_is_not_finite_in_one_ranks_rows_changes_no_ranks():
    """The verdict is over all rows: one rank alone sees the infinity."""
    assert run_on_ranks(2, poisoned_on_rank) == [(1, True, 1), (1, True, 0)]


def moved_on_rank(rank, world_size, folder):
    """DDP, on under FSDP2, and back; each time compared with one that has not moved."""
    stays = config_of("none", backbone={"ema": 0.9})
    divided = config_of("fsdp2", backbone={"ema": 0.9})
    whole = model_of(stays)
    take(whole, stays, range(2), rank, world_size)
    first = checkpoint.save(folder, 2, whole, FACTS, runtime(), keep=9)

    model = model_of(divided)
    with torch.inference_mode():  # as a run is measured before its first step
        model.backbone.eval()
        model.embed(torch.zeros(2, 3, SIZE, SIZE), model.backbone)
        model.backbone.train()
    assert checkpoint.load(first, model, FACTS, runtime()) == 2
    again = checkpoint.save(folder, 3, model, FACTS, runtime(), keep=9)
    runs = [take(whole, stays, (2, 3), rank, world_size)]
    runs += [take(model, divided, (2, 3), rank, world_size)]
    last = checkpoint.save(folder, 4, model, FACTS, runtime(), keep=9)

    back = model_of(stays)
    checkpoint.load(last, back, FACTS, runtime())
    back_again = checkpoint.save(folder, 5, back, FACTS, runtime(), keep=9)
    return runs, (first, again), (last, back_again)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_of_ddp_goes_on_under_fsdp2_and_back(tmp_path):
    """Byte-equal weights, statistics, states and averages, on this and on another number."""
    for runs, *pairs in run_on_ranks(2, moved_on_rank, tmp_path):
        for one, other in zip(*runs, strict=True):
            assert other == pytest.approx(one, rel=1e-6)
        for before, after in pairs:
            for file in ("backbone", "optimizer", "average"):
                old, new = (load_file(at / f"{file}.safetensors") for at in (before, after))
                assert old.keys() == new.keys()
                for name, value in old.items():
                    assert new[name].numpy().tobytes() == value.numpy().tobytes(), name
    alone = model_of(config_of("fsdp2", backbone={"ema": 0.9}))
    assert alone.shards is None, "one rank divides nothing"
    checkpoint.load(tmp_path / "step_00000004", alone, FACTS, runtime())
    saved = load_file(tmp_path / "step_00000004" / "backbone.safetensors")
    for name, value in alone.state().items():
        assert torch.equal(value, saved[name]), name


def tied_on_rank(rank, world_size):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    try:
        fsdp.shard(config_of("fsdp2"), network, runtime())
    except ConfigError as error:
        return str(error)


@pytest.mark.distributed
def test_a_weight_with_two_names_is_refused_at_the_start():
    """The first checkpoint would have ended the run."""
    for told in run_on_ranks(2, tied_on_rank):
        assert '"fsdp2": 1.weight is a parameter that has another name too' in told


def words_on_rank(rank, world_size):
    said = []
    for kind in ("none", "fsdp2"):
        model = model_of(config_of(kind, optimizer={"decay": "matrices"}))
        said.append(groups_in_words(model.optimizer, model.shards))
    return said


@pytest.mark.distributed
def test_groups_are_told_in_whole_weights():
    for whole, divided in run_on_ranks(2, words_on_rank):
        assert whole == divided
        assert "weights without decay" in whole


@pytest.mark.parametrize("ranks", [1, 2, 7, 8])
def test_rows_are_cut_as_torch_cuts(ranks):
    for length in (1, 2, 7, 8, 9, 64, 100):
        chunks = torch.arange(length).chunk(ranks)
        ours = [[*rows_of(length, rank, ranks)] for rank in range(ranks)]
        theirs = [chunk.tolist() for chunk in chunks] + [[]] * (ranks - len(chunks))
        assert ours == theirs


def test_blocks_are_the_innermost_lists_of_one_class():
    assert [type(one).__name__ for one in blocks_of(vit())] == ["_Block"] * 2
    stages = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)]
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(*stages), nn.ModuleDict({"a": inner}))
    assert blocks_of(network) == [*stages, *inner]
    assert not blocks_of(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"precision": {"compute": "fp16"}}, "Use bf16"),
        ({"optimizer": {"name": "muon"}}, "norms of whole weights"),
        ({"backbone": {"lora": {"rank": 4}}, "run": {"start_from": "base.pt"}}, "lora.rank = 4"),
        ({"backbone": {"compile": True}}, "backbone.compile = true"),
        ({"backbone": {"offload": True, "ema": 0.9}}, "backbone.ema = 0.9"),
        ({"backbone": {"offload": True}, "run": {"device": "cpu"}}, "host memory already"),
    ],
)
def test_what_does_not_go_with_it_is_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        config_of("fsdp2", **sections)


def test_its_settings_without_it_are_refused():
    for key, value in (("reshard", False), ("offload", True)):
        with pytest.raises(ValueError, match=rf"backbone.{key} = .*Set backbone.shard"):
            settings(backbone={key: value})


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_changes_to_fsdp2_and_back_on_other_ranks_and_is_exported(packs, tmp_path):
    """Measured before its first step, which gathers without training; stopped and gone on twice."""
    words = ["verification.every_steps=2", "verification.identification=[]", "run.preflight=false"]
    words += ["checkpoint.every_steps=2", "backbone.ema=0.9"]
    words += ["schedule.warmup_steps=0", "schedule.final_factor=1"]  # of no length
    plain = run(packs, tmp_path / "plain", *words, "run.steps=6", ranks=2)
    assert plain.returncode == 0, plain.stderr
    folder = tmp_path / "run"
    for steps, ranks, shard in ((2, 2, "fsdp2"), (4, 2, "none"), (6, 3, "fsdp2")):
        going = [f"run.steps={steps}", f"backbone.shard={shard}"]
        done = run(packs, folder, *words, *going, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert losses(folder)[1] == pytest.approx(losses(tmp_path / "plain")[1], rel=1e-6)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    words = [folder, tmp_path / "out", "--formats", "safetensors"]
    exported = python("-m", "partialfc", "export", *words)
    assert exported.returncode == 0, exported.stderr
