"""Runs that train adapters: what changes, what a checkpoint holds, and where its base is found."""

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.backbones import build_backbone
from partialfc.backbones.lora import adapters
from partialfc.backbones.timm_import import timm
from partialfc.backbones.timm_network import TimmNetwork
from partialfc.checkpoint import CheckpointError
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.base import fact_of, restore_base
from partialfc.checkpoint.pretrained import load_pretrained, pretrained_state
from partialfc.checkpoint.trained_backbone import open_backbone, state_at
from partialfc.commands._estimate.backbone import backbone_parts, count_backbone
from partialfc.config import ConfigError, load, to_toml
from partialfc.model.adapted import adapted
from partialfc.model.build import assemble, new_backbone
from partialfc.model.step import train_step
from partialfc.training.open_run import open_run
from partialfc.training.opened import begin
from tests.support.models import batch, runtime, settings
from tests.support.places import ROOT
from tests.support.runs import UNVERIFIED, killed_at, losses, run

FACTS = {"seed": 2048}
SIZE, DIM = 16, 8
LORA = {"rank": 4, "alpha": 8.0, "targets": ["fc"], "also_train": ["features"]}


def backbone():
    return build_backbone("convnet_s", embedding_dim=DIM, image_size=SIZE)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "base.safetensors"
    save_file(backbone().state_dict(), path)
    return path


def model_of(base, **more):
    config = settings(
        run={"start_from": str(base)},
        backbone={"name": "convnet_s", "embedding_dim": DIM, "lora": LORA, "ema": 0.3, **more},
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_size": SIZE})})
    torch.manual_seed(0)
    network = backbone()
    network.load_state_dict(state_at(base, config))
    adapted(network, config.backbone.lora, SIZE)
    head = PartialFC(40, DIM, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
    return config, assemble(config, runtime(), network, head)


def text_of(config):
    """Settings as a run's folder has them, with a size of images that a user may ask for."""
    return to_toml(config).replace(f"image_size = {SIZE}", "image_size = 32")


def everything(model):
    average = {f"average of {name}": one for name, one in model.average.tensors.items()}
    found = {**model.backbone.state_dict(), **average, "centers": model.head.centers}
    return {name: value.detach().clone() for name, value in found.items()}


def test_only_adapters_what_is_asked_for_and_the_head_change(base):
    config, model = model_of(base)
    before = everything(model)
    for step in range(3):
        train_step(model, config, *batch(step, 24, size=SIZE), 0.05)
    after = everything(model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    own = {
        "fc.lora_down",
        "fc.lora_up",
        "features.weight",
        "features.bias",
        "features.running_mean",
        "features.running_var",
    }
    expected = own | {f"average of {name}" for name in own} | {"centers"}
    assert changed == expected | {"features.num_batches_tracked"}
    assert model.own == own | {"features.num_batches_tracked"}
    assert {name for name in after if name.startswith("average")} == expected - own - {"centers"}
    in_optimizer = sum(len(group["params"]) for group in model.optimizer.param_groups)
    assert in_optimizer == 4


def test_a_resume_finds_its_base_and_goes_on_bit_for_bit(base, tmp_path):
    def steps(stop):
        config, model = model_of(base)
        for step in range(4):
            if step == stop:
                facts = FACTS | fact_of(base, model.backbone, config)
                path = checkpoint.save(tmp_path / "saved", 2, model, facts, runtime(), keep=1)
                held = load_file(path / "backbone.safetensors")
                assert held.keys() == model.own, "the adapters alone, and what is trained"
                torch.manual_seed(7)
                _, model = model_of(base)
                torch.nn.init.zeros_(model.backbone.stages[0][0].weight)
                checkpoint.load(path, model, FACTS, runtime())
                assert restore_base(path, model.backbone, config, state_at).items() <= facts.items()
            train_step(model, config, *batch(step, 24, size=SIZE), 0.05)
        return everything(model)

    straight, stopped = steps(None), steps(2)
    assert straight.keys() == stopped.keys()
    for name, value in straight.items():
        assert torch.equal(value, stopped[name]), name


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_base_that_is_not_there_is_refused_by_name(base, tmp_path, what):
    config, model = model_of(base)
    facts = FACTS | fact_of(base, model.backbone, config)
    path = checkpoint.save(tmp_path / "saved", 2, model, facts, runtime(), keep=1)
    if what == "gone":
        base.unlink()
    else:
        torch.manual_seed(4)
        save_file(backbone().state_dict(), base)
    message = "Put them back where they were; a run that goes on .* run.start_from"
    with pytest.raises(CheckpointError, match=message) as refused:
        restore_base(path, model.backbone, config, state_at)
    assert str(base) in str(refused.value)
    assert facts["base"]["sha256"][:16] in str(refused.value)
    assert ("it holds other weights" in str(refused.value)) == (what == "another")


@pytest.mark.parametrize("kept", [False, True])
def test_a_base_that_its_run_may_delete_is_warned_of(base, tmp_path, capsys, kept):
    """Adapters note one checkpoint, and its run keeps the newest two."""
    config, model = model_of(base, lora={}, ema=0.0)
    checkpoint.save(tmp_path / "old" / "checkpoints", 6, model, FACTS, runtime(), keep=1)
    kept_steps = {"every_steps": 2, "keep_every_steps": 2 if kept else 0}
    of_base = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update=kept_steps)}
    )
    (tmp_path / "old" / "config.toml").write_text(text_of(of_base))
    config, model = model_of(tmp_path / "old")
    new = config.run.model_copy(update={"folder": tmp_path / "new"})
    config = config.model_copy(update={"run": new})
    fact = begin(config, runtime(), model, None)
    warned = capsys.readouterr().out
    assert warned.count("warning: ") == (not kept)
    assert ("checkpoint.keep_every_steps" in warned and fact["base"]["place"] in warned) != kept


@pytest.mark.parametrize("cycle", [1, 2, 12])
def test_adapters_on_themselves_are_refused_by_name(base, tmp_path, cycle):
    """Checkpoints are a stranger's: one may say that it is its own base, also by way of others."""
    config, model = model_of(base)
    paths = [tmp_path / str(n) / "checkpoints" / "step_00000002" for n in range(cycle)]
    for n, path in enumerate(paths):
        noted = {"place": str(paths[(n + 1) % cycle]), "sha256": "0" * 64}
        checkpoint.save(path.parent, 2, model, FACTS | {"base": noted}, runtime(), keep=1)
        (path.parents[1] / "config.toml").write_text(text_of(config))
    message = "it is the base of its own adapters" if cycle < 8 else "more than 8 runs of adapters"
    for use in (open_backbone, lambda path: restore_base(path, model.backbone, config, state_at)):
        with pytest.raises(CheckpointError, match=message) as refused:
            use(paths[0])
        assert str(paths[0]) in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbone.lora.rank=4"], "backbone.lora.rank = 4 without run.start_from"),
        (
            ["backbone.lora.rank=4", "run.start_from=x", "backbone.freeze=['fc']"],
            r"backbone.freeze = \['fc'\] with backbone.lora.rank = 4",
        ),
        (["backbone.lora.targets=fc"], "backbone.lora.targets = .* rank = 0 is no adapters"),
    ],
)
def test_settings_that_do_nothing_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "configs" / "demo.toml", words)


def test_unknown_layers_are_refused_with_those_there_are(base):
    with pytest.raises(ConfigError, match=r"backbone.lora.targets = .*There are fc"):
        model_of(base, lora={**LORA, "targets": ["attn.qkv"]})
    with pytest.raises(ConfigError, match=r"backbone.lora.also_train.*stages, fc, features"):
        model_of(base, lora={**LORA, "also_train": ["feature"]})


def test_the_estimate_has_no_optimizer_of_the_base():
    def memory(**lora):
        about = {"name": "vit_t", "lora": lora}
        data = {"train": "unused.rec", "global_batch": 2, "image_size": 32}
        config = settings(run={"start_from": "x"}, data=data, backbone=about)
        parts = backbone_parts(config, count_backbone(config, 1), 1)
        return {one.name: max(one.bytes) for one in parts}

    full, lora = memory(), memory(rank=8)
    per_block = (256 + 3 * 256) + (256 + 256) + 2 * (256 + 4 * 256)
    assert lora["optimizer"] == lora["gradients"] == 4 * 8 * 12 * per_block
    assert lora["weights"] == full["weights"] + lora["optimizer"]


def test_a_network_of_timm_is_the_base_that_its_file_is(tmp_path, monkeypatch):
    """Its embedding layer is in no file, so it must be trained; checkpoints hold it.

    And it is the same base on a CPU that resamples position embeddings to other bits.
    """
    pretrained = tmp_path / "vit.safetensors"
    torch.manual_seed(3)
    save_file(timm().create_model("test_vit", num_classes=7).state_dict(), pretrained)

    def made(*also_train):
        about = {"name": "timm/test_vit", "pretrained": str(pretrained), "embedding_dim": DIM}
        config = settings(
            data={"train": "unused.rec", "global_batch": 4, "image_size": 160},
            backbone={**about, "lora": {"rank": 2, "also_train": also_train}},
        )
        model = assemble(config, runtime(), new_backbone(config), PartialFC(40, DIM, ArcFace()))
        load_pretrained(pretrained, config, model)
        return config, model

    with pytest.raises(ConfigError, match=r"fc, features .* begin at random"):
        made("norm")
    config, model = made("norm", "fc", "features")
    base = pretrained_state(pretrained, config)
    train_step(model, config, *batch(0, 4, size=160), 0.05)
    facts = FACTS | fact_of(pretrained, model.backbone, config)
    path = checkpoint.save(tmp_path / "saved", 1, model, facts, runtime(), keep=1)
    held = load_file(path / "backbone.safetensors")
    assert not held.keys() & base.keys()
    _, other = made("norm", "fc", "features")
    torch.nn.init.zeros_(other.backbone.network.blocks[0].attn.qkv.weight)
    checkpoint.load(path, other, FACTS, runtime())
    restore_base(path, other.backbone, config, state_at)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, other.backbone.state_dict()[name]), name

    def on_another_cpu(network, state, convert=TimmNetwork.converted):
        found = convert(network, state)
        return found | {"network.pos_embed": found["network.pos_embed"].nextafter(torch.ones(()))}

    monkeypatch.setattr(TimmNetwork, "converted", on_another_cpu)
    restore_base(path, other.backbone, config, state_at)
    weights = load_torch(pretrained)
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1}, pretrained)
    with pytest.raises(CheckpointError, match="it holds other weights"):
        restore_base(path, other.backbone, config, state_at)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_of_adapters_goes_on_on_another_number_of_ranks(packs, tmp_path):
    """And is used merged; where its base has moved to, it must be told."""
    base, killed, straight = tmp_path / "base.pt", tmp_path / "killed", tmp_path / "straight"
    torch.manual_seed(5)
    network = build_backbone("convnet_s", embedding_dim=128, image_size=32).eval()
    torch.save(network.state_dict(), base)
    common = [
        "backbone.lora={rank=4, targets='fc'}",
        "run.steps=6",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        *UNVERIFIED,
    ]
    stopped = killed_at(4, packs, killed, f"run.start_from={base}", *common)
    assert stopped.returncode == -9, stopped.stderr
    moved = base.rename(tmp_path / "moved.pt")
    refused = run(packs, killed, f"run.start_from={base}", *common)
    assert refused.returncode == 4, refused.stderr
    assert f"{base}: " in refused.stderr
    for folder in (killed, straight):
        done = run(packs, folder, f"run.start_from={moved}", *common)
        assert done.returncode == 0, done.stderr
    assert losses(killed) == pytest.approx(losses(straight), rel=1e-4)

    before = network.state_dict()
    last = load_file(killed / "checkpoints" / "step_00000006" / "backbone.safetensors")
    assert last.keys() == {"fc.lora_down", "fc.lora_up"}
    trained = open_backbone(killed)
    assert trained.state.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(trained.state[name], value) == (name != "fc.weight")
    images = batch(0, 4, size=32)[0]
    with open_run(killed) as opened, torch.no_grad():
        assert not [*adapters(opened.model.backbone)]
        merged = opened.model.backbone.eval()(images)
    up, down = (torch.from_numpy(last[f"fc.lora_{which}"]).double() for which in ("up", "down"))
    with torch.no_grad():
        network.fc.weight.copy_(network.fc.weight.double() + up @ down)
        for found in (merged, trained.backbone()(images)):
            assert (found - network(images)).norm() < 1e-6 * found.norm()
