"""Several heads of a run are those that would be trained on their rows alone."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from partialfc import PartialFC
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.folder import read_manifest
from partialfc.checkpoint.parts import centers_of
from partialfc.config import Config, ConfigError
from partialfc.config.heads import each_head, holders_of_heads, rows_of_heads
from partialfc.distributed.ranks import Ranks
from partialfc.model.build import assemble, build, margin_of, row_rule_of, seed_of
from partialfc.model.heads import Heads, Numbering
from partialfc.model.optimizer import build_optimizer, set_rate
from partialfc.model.step import train_step
from tests.support.models import Flat, batch, runtime, share
from tests.support.ranks import run_on_ranks

SETS = {"faces": range(40), "things": range(40, 60), "words": range(60, 75)}
ARCFACE = {"name": "arcface", "scale": 16.0}
HEADS = {
    "people": {"sets": ["faces", "words"], "sample_rate": 0.5, "margin": ARCFACE},
    "things": {
        "weight": 0.25,
        "margin": {"name": "cosface", "scale": 16.0},
        "optimizer": {"name": "adamw", "lr_factor": 0.1},
    },
}
NUMBERINGS = {
    "people": Numbering((SETS["faces"], SETS["words"])),
    "things": Numbering((SETS["things"],)),
}


def settings(**sections) -> Config:
    sets = {"faces": 12, "things": 7, "words": 5}
    sections.setdefault("heads", HEADS)
    return Config.model_validate(
        {
            "precision": {"compute": "fp32"},
            "data": {
                "global_batch": 24,
                "sets": {name: {"train": f"{name}.rec", "images": n} for name, n in sets.items()},
            },
            "optimizer": {"name": "sgd", "clip_norm": 0.0},
            **sections,
        }
    )


def new_heads(config) -> Heads:
    holders = holders_of_heads(config, Ranks.of().size)
    return Heads(
        {
            name: PartialFC(
                NUMBERINGS[name].count,
                16,
                margin_of(one),
                sample_rate=one.head.sample_rate,
                optimizer=row_rule_of(one),
                seed=seed_of(config, name),
                canonical_shards=8,
                holders=holders[name],
            )
            for name, one in each_head(config).items()
        },
        NUMBERINGS,
    )


def composed(step, config):
    """A batch whose places have identities of their sets."""
    images, _ = batch(step, 24)
    generator = torch.Generator().manual_seed(step)
    identities = torch.empty(24, dtype=torch.int64)
    for name, span in SETS.items():
        rows = torch.from_numpy(rows_of_heads(only(config, name))["one"])
        numbers = torch.randint(span.start, span.stop, (24,), generator=generator)
        identities[rows] = numbers[rows]
    return images, identities


def only(config, name):
    """The settings with one head on one set, to ask for its places."""
    heads = {"one": {"sets": [name]}, "rest": {"sets": [*SETS]}}
    return settings(heads=heads)


def on_ranks(**ranks):
    """The heads, some of them on so many ranks alone."""
    return {name: {**one, "ranks": ranks.get(name)} for name, one in HEADS.items()}


def trained(rank, world_size, accumulation, heads=HEADS):
    optimizer = {"name": "sgd", "clip_norm": 0.0, "accumulation": accumulation}
    config = settings(optimizer=optimizer, heads=heads)
    torch.manual_seed(0)
    model = assemble(config, runtime(), Flat(8, 16), new_heads(config))
    losses = []
    for step in range(3):
        images, identities = (share(one, rank, world_size) for one in composed(step, config))
        done = train_step(model, config, images, identities, 0.05)
        losses.append({"all": done.loss.item(), **{k: v.item() for k, v in done.terms.items()}})
    centers = {name: head.centers.detach().clone() for name, head in model.heads.items()}
    return losses, model.backbone.project.weight.detach().clone(), centers


def alone(config):
    """The same by hand: two heads, each called with its rows and its numbers, and one sum."""
    torch.manual_seed(0)
    backbone, heads = Flat(8, 16), new_heads(config)
    optimizer = build_optimizer(config, backbone)
    set_rate(optimizer, 0.05)
    losses = []
    for step in range(3):
        images, identities = composed(step, config)
        places = {name: torch.from_numpy(own) for name, own in rows_of_heads(config).items()}
        is_thing = (identities >= 40) & (identities < 60)
        assert torch.equal(places["things"], is_thing)
        numbers = {"things": identities - 40, "people": identities - 20 * (identities >= 60)}
        embeddings, found = backbone(images), {}
        for name, head in heads.items():
            factor = {"people": 1.0, "things": 0.1}[name]
            head.optimizer.param_groups[0]["lr"] = 0.05 * factor
            rows = places[name]
            found[name] = head(embeddings[rows], numbers[name][rows])
        (found["people"] + 0.25 * found["things"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for head in heads.values():
            head.optimizer.step()
        losses.append({name: one.item() for name, one in found.items()})
    centers = {name: head.centers.detach().clone() for name, head in heads.items()}
    return losses, backbone.project.weight.detach(), centers


def test_two_heads_are_two_heads_on_their_rows_to_the_last_bit():
    """Rows, numbers of identities, weights, rates, rules and margins are each head's own."""
    losses, weight, centers = trained(0, 1, 1)
    expected, expected_weight, expected_centers = alone(settings())
    for one, other in zip(losses, expected, strict=True):
        assert {name: one[name] for name in other} == other
        assert one["all"] == pytest.approx(other["people"] + 0.25 * other["things"], rel=1e-6)
    assert torch.equal(weight, expected_weight)
    for name, value in expected_centers.items():
        assert torch.equal(centers[name], value), name


def assert_like_one_rank(parted):
    """Losses, weights and all centers of several ranks are those of heads called by hand."""
    expected, weight_of_one, centers_of_one = alone(settings())
    for losses, weight, _ in parted:
        for one, other in zip(losses, expected, strict=True):
            assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-5)
        assert (weight - weight_of_one).norm() <= 1e-5 * weight_of_one.norm()
    for name, value in centers_of_one.items():
        centers = torch.cat([centers[name] for _, _, centers in parted])
        assert (centers - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (2, 2), (1, 3)])
def test_ranks_and_micro_batches_change_rounding_alone(ranks, accumulation):
    """A head's 7 rows are not as many on each rank, nor in each micro-batch."""
    parted = run_on_ranks(ranks, trained, accumulation)
    assert_like_one_rank(parted)


@pytest.mark.distributed
def test_heads_on_some_of_the_ranks_change_rounding_alone():
    """One head on the first of three ranks, the other on the two behind it."""
    parted = run_on_ranks(3, trained, 1, on_ranks(people=1, things=2))
    held = {name: [len(centers[name]) for *_, centers in parted] for name in HEADS}
    assert held == {"people": [55, 0, 0], "things": [0, 10, 10]}
    assert_like_one_rank(parted)


@pytest.mark.parametrize(
    ("ranks", "world_size", "expected"),
    [
        ({"people": 1, "things": 1}, 1, [None, None]),
        ({"people": 1, "things": 1}, 4, [range(1), range(1, 2)]),
        ({"people": 3, "things": 2}, 4, [range(3), range(2)]),
        ({"things": 2}, 4, [None, range(2)]),
        ({"people": 9, "things": 2}, 4, [None, range(2)]),
    ],
)
def test_heads_take_the_ranks_in_turn(ranks, world_size, expected):
    found = holders_of_heads(settings(heads=on_ranks(**ranks)), world_size)
    assert found == dict(zip(HEADS, expected, strict=True))


def legs(rank, world_size, folder, more):
    """Go on from the newest checkpoint of the folder, if there is one; save at the end."""
    config = settings(heads=on_ranks(things=1))
    torch.manual_seed(0)
    model = assemble(config, runtime(), Flat(8, 16), new_heads(config))
    found, first = checkpoint.newest(folder, runtime()), 0
    if found is not None:
        first = checkpoint.load(found, model, {}, runtime())
    losses = []
    for step in range(first, first + more):
        images, identities = (share(one, rank, world_size) for one in composed(step, config))
        losses.append(train_step(model, config, images, identities, 0.05).loss.item())
    checkpoint.save(folder, first + max(more, 1), model, {}, runtime(), keep=9)
    return losses


def rows(path, head):
    """All rows of a head and of its states, whatever number of ranks wrote them."""
    begin = centers_of(head)
    files = [load_file(file) for file in sorted(path.glob(f"{begin}[0-9]*.safetensors"))]
    return {name: np.concatenate([file[name] for file in files]) for name in files[0]}


@pytest.mark.distributed
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 2), (2, 3), (3, 1)])
def test_a_checkpoint_of_heads_is_read_on_any_number_of_ranks(saved_at, loaded_at, tmp_path):
    """Rows and states as bytes, each head's under its name; the steps behind it to rounding."""
    (straight, *_) = run_on_ranks(1, legs, tmp_path / "straight", 5)
    (before, *_) = run_on_ranks(saved_at, legs, tmp_path / "legs", 3)
    run_on_ranks(loaded_at, legs, tmp_path / "legs", 0)
    written, again = (tmp_path / "legs" / f"step_{step:08d}" for step in (3, 4))
    assert sorted(read_manifest(written)["heads"]) == ["people", "things"]
    for head, count in (("people", 55), ("things", 20)):
        found, other = rows(written, head), rows(again, head)
        assert len(found["centers"]) == count
        assert found.keys() == other.keys()
        for name, value in found.items():
            assert value.tobytes() == other[name].tobytes(), (head, name)
    shutil.rmtree(again)
    (after, *_) = run_on_ranks(loaded_at, legs, tmp_path / "legs", 2)
    assert before + after == pytest.approx(straight, rel=1e-5)


def test_heads_do_not_begin_with_the_same_centers_or_negatives():
    model = build(settings(), runtime(), NUMBERINGS)
    people, things = model.heads.values()
    assert not torch.equal(people.centers[:20], things.centers)
    assert people.seed != things.seed
    with pytest.raises(ConfigError, match="the heads people, things"):
        _ = model.head


def test_an_identity_of_another_set_is_refused():
    config = settings()
    model = assemble(config, runtime(), Flat(8, 16), new_heads(config))
    images, identities = composed(0, config)
    identities[rows_of_heads(config)["things"].argmax()] = 3
    with pytest.raises(ValueError, match="identit"):
        train_step(model, config, images, identities, 0.05)


def test_a_head_without_a_row_on_a_rank_is_refused_with_the_counts():
    config = settings()
    config.check(2)
    with pytest.raises(ConfigError, match="things: rank 4 has none of its 7 images") as found:
        config.check(8)
    assert "8 ranks x optimizer.accumulation = 1 want at least 16" in str(found.value)


@pytest.mark.parametrize(
    ("heads", "head", "line"),
    [
        ({"people": {"sets": ["faces", "people"]}}, {}, "there is no [data.sets.people]"),
        ({"faces": {}}, {}, "[data.sets.things]: no head trains on it"),
        (HEADS, {"sample_rate": 0.1}, "[head] with [heads.people]"),
        ({"triplet": {"sets": ["faces"]}}, {}, "loss_triplet is another number"),
        ({"a-b": {"sets": ["faces"]}}, {}, "[heads.a-b]: it must be a word"),
    ],
)
def test_heads_that_do_not_fit_their_sets_are_refused(heads, head, line):
    with pytest.raises(Exception) as found:
        settings(heads=heads, head=head)
    assert line in str(found.value)
