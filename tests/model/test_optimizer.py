"""Which weights are trained, at which rate, with which decay, and how gradients are clipped."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from partialfc import ArcFace, PartialFC, RowSGD
from partialfc.backbones import BACKBONES, build_backbone
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.optimizer_states import named_states, restore_states
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._estimate.backbone import backbone_parts, count
from partialfc.config import ConfigError, load, to_toml
from partialfc.errors import CheckpointError
from partialfc.model.build import assemble
from partialfc.model.frozen import freeze, frozen_words
from partialfc.model.groups import layers_of, matrices_of
from partialfc.model.optimizer import clip, groups_in_words, kept_numbers, set_rate
from partialfc.model.step import train_step
from tests.support.models import batch, runtime, settings, share, weights
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, run


class Blocks(nn.Module):
    """A stem, two blocks, an end, and a position: what rules tell apart."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 16))
        self.stem = nn.Linear(192, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)) for _ in range(2)
        )
        self.end = nn.Linear(16, 16, bias=False)

    def forward(self, images):
        x = self.stem(images.flatten(1)) + self.position
        for block in self.blocks:
            x = x + block(x)
        return self.end(x)


def made(**sections):
    config = settings(**sections)
    torch.manual_seed(0)
    head = PartialFC(40, 16, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
    return config, assemble(config, runtime(), Blocks(), head)


def by_name(model, key):
    """What a group says, by the name of each of its parameters."""
    names = {one: name for name, one in model.backbone.named_parameters()}
    return {
        names[one]: group[key] for group in model.optimizer.param_groups for one in group["params"]
    }


def test_without_a_setting_there_is_one_group_in_the_backbones_order():
    """So that what ran before runs on to the last bit."""
    _, model = made()
    (group,) = model.optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], model.backbone.parameters(), strict=True))
    assert group["lr_factor"] == 1
    assert groups_in_words(model.optimizer) == ""


def test_rates_fall_from_layer_to_layer_and_by_name():
    rates = {"blocks": 4.0, "blocks.1": 2.0}
    _, model = made(optimizer={"name": "sgd", "layer_decay": 0.5, "rates": rates})
    factors = by_name(model, "lr_factor")
    assert factors["position"] == factors["stem.bias"] == 0.5**3
    assert factors["blocks.0.0.weight"] == 4 * 0.5**2
    assert factors["blocks.1.1.bias"] == 2 * 0.5
    assert factors["end.weight"] == 1
    set_rate(model.optimizer, 0.1)
    assert by_name(model, "lr")["stem.weight"] == pytest.approx(0.1 / 8)
    assert "rates times 0.125 to 1" in groups_in_words(model.optimizer)


class WithUnused(Blocks):
    """Its second head has no gradient, so torch's AdamW makes no state of it."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(16, 16)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_parameter_without_gradients_has_states_or_none_in_a_checkpoint(tmp_path, name):
    """AdamW makes states at the first gradient, so such a run could never be resumed."""

    def model_of():
        config = settings(optimizer={"name": name})
        torch.manual_seed(0)
        head = PartialFC(40, 16, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
        return config, assemble(config, runtime(), WithUnused(), head)

    config, model = model_of()
    train_step(model, config, *batch(0, 24), 1e-3)
    path = checkpoint.save(tmp_path, 1, model, {}, runtime(), keep=1)
    _, again = model_of()
    assert checkpoint.load(path, again, {}, runtime()) == 1
    found, saved = (named_states(one.optimizer, one.parameters()) for one in (again, model))
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[key], value) for key, value in saved.items())
    assert any("unused" in key for key in saved) == (name == "lion")
    for part in ("stem.weight.", "unused.bias.")[: 1 + (name == "lion")]:
        key = next(key for key in saved if key.startswith(part))
        lacking = {one: value for one, value in saved.items() if one != key}
        _, fresh = model_of()
        with pytest.raises(CheckpointError, match=f"lacks the tensor {key}"):
            restore_states(fresh.optimizer, fresh.parameters(), lacking)


def test_matrices_alone_decay():
    _, model = made(optimizer={"name": "adamw", "decay": "matrices", "weight_decay": 0.3})
    decays = by_name(model, "weight_decay")
    matrices = {"stem.weight", "blocks.0.0.weight", "blocks.1.0.weight", "end.weight"}
    assert {name for name, value in decays.items() if value} == matrices
    assert set(decays.values()) == {0.0, 0.3}


_LARGE = "vit_h", "vit_l", "iresnet2060"


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in _LARGE])
def test_layers_of_our_backbones(name):
    """Every weight is in one layer; blocks are layers, and so are the stem and the end."""
    with torch.device("meta"):
        network = build_backbone(name)
    layers = layers_of(network)
    names = [one for layer in layers for one in layer]
    assert sorted(names) == sorted(one for one, _ in network.named_parameters())
    depth = {"iresnet50": 26, "vit_s": 14, "vit_b": 26, "mobilefacenet": 18, "convnet_s": 5}
    assert len(layers) == depth.get(name, len(layers)) > 4
    assert max(map(len, layers)) < 20
    spared = set(names) - matrices_of(network)
    wanted = ("bias", "norm", "bn", "prelu", "pos_embed", "mask_token")
    if name.startswith(("vit", "iresnet")):
        layer_norms = {one for one in spared if network.get_parameter(one).ndim == 1}
        assert all(any(word in one for word in wanted) for one in spared - layer_norms)


def test_a_network_of_others_says_what_does_not_decay():
    network = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    network.table = nn.Parameter(torch.zeros(9, 4))
    network.no_weight_decay = lambda: {"table"}
    assert matrices_of(network) == {"1.weight"}
    assert matrices_of(nn.Sequential(network)) == {"0.1.weight"}


def test_a_norm_is_exact_and_the_same_however_rows_are_cut():
    """In fp32 a CPU's is off by 1e-4, and by others of the rows that a rank has under FSDP2."""
    whole = nn.Parameter(torch.empty(3, 2**20))
    torch.manual_seed(0)
    whole.grad = torch.randn_like(whole)
    parts = [nn.Parameter(torch.empty_like(part)) for part in whole.grad.split([1, 2])]
    for part, own in zip(parts, whole.grad.split([1, 2]), strict=True):
        part.grad = own.clone()
    found = [clip(torch.optim.SGD(one, lr=0.1), 0.0) for one in ([whole], parts)]
    assert torch.equal(*found)
    assert found[0] == whole.grad.double().norm().float()
    assert found[0].dtype == torch.float32


def test_groups_are_clipped_each_by_itself():
    _, model = made(optimizer={"name": "sgd", "rates": {"stem": 0.5}})
    generator = torch.Generator().manual_seed(1)
    for group, size in zip(model.optimizer.param_groups, (1.0, 1e-3), strict=True):
        for one in group["params"]:
            one.grad = size * torch.randn(one.shape, generator=generator)
    groups = [[one.grad.clone() for one in g["params"]] for g in model.optimizer.param_groups]
    norms = [math.sqrt(sum(g.double().square().sum() for g in group)) for group in groups]
    total = clip(model.optimizer, 0.5, each=True)
    assert total.item() == pytest.approx(math.hypot(*norms), rel=1e-6)
    for group, before, norm in zip(model.optimizer.param_groups, groups, norms, strict=True):
        for one, gradient in zip(group["params"], before, strict=True):
            scaled = gradient * min(1.0, 0.5 / norm)
            torch.testing.assert_close(one.grad, scaled, rtol=1e-5, atol=0)


def test_steps_equal_a_plain_loop_with_torchs_groups_to_the_bit():
    optimizer = {
        "name": "adamw",
        "decay": "matrices",
        "layer_decay": 0.5,
        "rates": {"end": 0.25},
        "clip_norm": 0.0,
    }
    config, model = made(optimizer=optimizer, backbone={"freeze": ["blocks.0"]})
    _, plain = made(optimizer={"name": "adamw", "clip_norm": 0.0})
    factors, decays = by_name(model, "lr_factor"), by_name(model, "weight_decay")
    kept = [
        {"params": [one], "lr": 0.01 * factors[name], "weight_decay": decays[name]}
        for name, one in plain.backbone.named_parameters()
        if not name.startswith("blocks.0")
    ]
    reference = torch.optim.AdamW(kept, betas=(0.9, 0.999), eps=1e-8, fused=True)
    plain.backbone.blocks[0].eval()
    for step in range(4):
        images, identities = batch(step, 24)
        train_step(model, config, images, identities, 0.01)
        torch.manual_seed(model_seed(config, plain))
        plain.head(plain.embed(images), identities).backward()
        reference.step()
        plain.head.optimizer.param_groups[0]["lr"] = 0.01
        plain.head.optimizer.step()
        plain.backbone.zero_grad()
    for name, one in plain.backbone.state_dict().items():
        assert torch.equal(one, model.backbone.state_dict()[name]), name


def model_seed(config, model):
    from partialfc.keyed import key

    return key(config.run.seed, "dropout", model.head.optimizer.steps, 0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "lamb", "muon", "schedule_free"])
def test_what_is_frozen_stays_with_its_statistics_and_nothing_else_does(name):
    schedule = {"name": "linear", "final_factor": 1.0}
    config, model = made(
        optimizer={"name": name}, schedule=schedule, backbone={"freeze": ["blocks.0", "position"]}
    )
    before = {name: one.clone() for name, one in model.backbone.state_dict().items()}
    model.backbone.eval()
    model.train()  # as after every verification
    for step in range(2):
        train_step(model, config, *batch(step, 24), 0.01)
    for name, one in model.backbone.state_dict().items():
        still = name.startswith(("blocks.0.", "position"))
        assert torch.equal(one, before[name]) == still, name
    words = frozen_words(model.backbone, config.backbone.freeze)
    assert words == "320 of 3,968 weights stay as they are: blocks.0, position"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["block"], "It has position, stem, blocks, end"),
        (["blocks.7"], "blocks has 0, 1"),
        (["blocks.0.1.weights"], "blocks.0.1 has weight, bias"),
        ([""], "nothing in the backbone"),
        (["position", "stem", "blocks", "end"], "nothing of the backbone is left"),
    ],
)
def test_a_part_that_is_not_there_is_refused_with_those_that_are(names, message):
    with pytest.raises(ConfigError, match=message):
        made(backbone={"freeze": names})
    if len(names) == 1:
        with pytest.raises(ConfigError, match=message):
            made(optimizer={"name": "sgd", "rates": {names[0]: 0.5}})


def test_rates_are_written_as_they_are_read(tmp_path):
    """Names of modules have points, tables to TOML; a run's config.toml loads back equal."""
    file = tmp_path / "settings.toml"
    file.write_text(
        '[data]\ntrain = "x.rec"\n[backbone]\nfreeze = ["conv1"]\n'
        "[optimizer.rates]\nlayer1.0 = 0.5\n"
    )
    config = load(file, ["optimizer.rates.layer2=0.25"])
    assert config.optimizer.rates == {"layer1.0": 0.5, "layer2": 0.25}
    (again := tmp_path / "again.toml").write_text(to_toml(config))
    assert load(again) == config
    with pytest.raises(ConfigError, match=r"table of numbers in \(0, 1000\]"):
        load(file, ["optimizer.rates.layer2=0"])
    with pytest.raises(ConfigError, match="nothing is clipped"):
        load(file, ["optimizer.clip_groups=true", "optimizer.clip_norm=0"])


def test_a_rate_of_what_is_not_trained_is_refused():
    rates = {"name": "sgd", "rates": {"stem": 0.5}}
    with pytest.raises(ConfigError, match="nothing in it is trained"):
        made(optimizer=rates, backbone={"freeze": ["stem"]})


@pytest.mark.parametrize(
    ("name", "numbers", "copied"),
    [("sgd", 1, 0), ("adamw", 2, 0), ("lion", 1, 6), ("lamb", 2, 8), ("schedule_free", 2, 8)],
)
def test_the_estimate_counts_states_of_what_is_trained(name, numbers, copied):
    schedule = {"name": "linear", "final_factor": 1.0}
    config = settings(
        optimizer={"name": name}, schedule=schedule, backbone={"freeze": ["blocks", "position"]}
    )
    network = Blocks().to("meta")
    freeze(network, config.backbone.freeze)
    found = count(network, (4, 3, 8, 8))
    trained = 4 * (192 * 16 + 16 + 256)
    parts = {one.name: one.bytes for one in backbone_parts(config, found, 1)}
    assert found.trained == trained
    assert parts["optimizer"] == (numbers * trained,) * 4
    swapped = trained * (name == "schedule_free")
    assert parts["copies of weights"] == (0, 0, copied * trained, swapped)
    assert found.matrices == 4 * (192 * 16 + 256)
    rotated = kept_numbers(settings(optimizer={"name": "muon"}), found.trained, found.matrices)
    assert rotated == found.matrices + 2 * 4 * 16
    assert sum(one.numel() for one in network.parameters()) * 4 == found.weights


def tensors(folder, step, file):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / f"{file}.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_run_goes_on_with_its_groups_on_another_number_of_ranks(packs, tmp_path):
    """Bit for bit on as many ranks; what is frozen stays, and must be the same to go on."""
    common = [
        "run.steps=4",
        "checkpoint.every_steps=2",
        "optimizer={name='schedule_free', layer_decay=0.5, decay='matrices'}",
        "optimizer.rates.features=2.0",
        "schedule={name='linear', final_factor=1, warmup_steps=1}",
        "backbone.freeze=['stages.0']",
        *UNVERIFIED,
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = run(packs, whole, *common, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "weights stay as they are: stages.0; " in done.stdout
    assert "backbone.freeze without run.start_from" in done.stdout
    shutil.copytree(whole, stopped)
    for leftover in ("checkpoints/step_00000004", "summary.json"):
        path = stopped / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run(packs, stopped, *common, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    for file in ("backbone", "average", "optimizer"):
        for name, value in tensors(whole, 4, file).items():
            assert np.array_equal(tensors(stopped, 4, file)[name], value), (file, name)
    shutil.rmtree(stopped / "checkpoints/step_00000004")
    (stopped / "summary.json").unlink()
    alone = run(packs, stopped, *common)
    assert alone.returncode == 0, alone.stderr
    means, used = tensors(stopped, 4, "average"), open_backbone(stopped).state
    for name, value in means.items():
        assert np.array_equal(used[name], value), name
    first, last = (tensors(folder, step, "backbone") for folder, step in ((whole, 2), (stopped, 4)))
    same = {name for name, value in last.items() if np.array_equal(value, first[name])}
    assert same == {name for name in last if name.startswith("stages.0.")}
    refused = run(packs, stopped, *common, "backbone.freeze=[]", "run.steps=6")
    assert refused.returncode == 4
    assert 'backbone.freeze = ["stages.0"], this run has null' in refused.stdout + refused.stderr


def on_a_rank(rank, world_size, names):
    from partialfc.distributed.ranks import Ranks
    from partialfc.runtime.process import Runtime

    config = settings(
        backbone={"freeze": names}, optimizer={"name": "sgd", "decay": "matrices", "clip_norm": 1.0}
    )
    torch.manual_seed(rank)  # DDP gives all ranks the weights of rank 0
    head = PartialFC(40, 16, ArcFace(scale=16), sample_rate=0.5, optimizer=RowSGD(lr=0.1))
    model = assemble(config, Runtime(Ranks.of(), torch.device("cpu")), Blocks(), head)
    before = {name: one.clone() for name, one in model.backbone.state_dict().items()}
    for step in range(3):
        images, identities = (share(one, rank, world_size) for one in batch(step, 24))
        train_step(model, config, images, identities, 0.05)
    return before, {name: one.clone() for name, one in model.backbone.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("names", [["stem", "blocks.0"], ["blocks.1", "end"]])
def test_ranks_train_what_is_not_frozen_together(names):
    """DDP has no bucket for what is frozen and does not wait for its gradients."""
    (before, first), (_, second) = run_on_ranks(2, on_a_rank, names)
    for name, one in first.items():
        if name.endswith("0.bias"):  # before BatchNorm: its gradient is 0
            continue
        assert torch.equal(one, before[name]) == any(name.startswith(f"{p}.") for p in names), name
        if "running" not in name:
            assert torch.equal(one, second[name]), name


def test_a_bad_batch_changes_no_group():
    config, model = made(optimizer={"name": "sgd", "layer_decay": 0.5, "clip_groups": True})
    train_step(model, config, *batch(0, 24), 0.05)
    model.head.optimizer.catch_up(None)
    before = weights(model)
    images, identities = batch(1, 24)
    images[3] = torch.nan
    assert train_step(model, config, images, identities, 0.05).skipped == 1
    assert all(map(torch.equal, before, weights(model)))
