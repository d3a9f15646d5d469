"""Fine-tuning: a new run that begins with a trained backbone, and with centers that move."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partialfc.__main__ import main
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint import stored_rows
from partialfc.commands import identities
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.errors import DataError
from partialfc.head.centers import fill_initial_
from tests.support.runs import UNVERIFIED, run
from tools.bench._faults.runs import tensors

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(packs, tmp_path_factory):
    """A run of some steps, and its folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run(packs, folder, "run.steps=6", "verification.identification=[]")
    assert done.returncode == 0, done.stderr
    return folder


def begin(packs, out, *overrides):
    """Start a run that takes one step so small that nothing moves; return its tensors."""
    still = ["run.steps=1", "optimizer.lr=1e-30", "schedule.warmup_steps=0", "run.seed=7"]
    done = run(packs, out, *still, *UNVERIFIED, *overrides)
    assert done.returncode == 0, done.stderr
    return tensors(out, 1)


@pytest.mark.slow
def test_a_run_begins_with_a_backbone_alone_or_with_centers(packs, trained, tmp_path):
    before = tensors(trained, 6)
    alone = begin(packs, tmp_path / "alone", f"run.start_from={trained}")
    assert identities.main([str(trained), str(tmp_path / "start")]) == 0
    both = begin(packs, tmp_path / "both", f"run.start_from={tmp_path / 'start'}")
    weights = [
        n for n in before if n.startswith("backbone:") and "running" not in n and "num_" not in n
    ]
    for name in weights:
        assert np.array_equal(alone[name], before[name]), name
        assert np.array_equal(both[name], before[name]), name
    centers = centers_of(trained).numpy()
    assert not np.array_equal(centers, before["centers:centers"]), "no row has moved unsampled"
    assert np.array_equal(both["centers:centers"], centers)
    assert not np.allclose(alone["centers:centers"], centers)


def centers_of(trained):
    """The centers of the last step; a checkpoint has some as their last sampled step left them."""
    with identities.open_run(trained) as opened:
        return opened.model.head.centers.detach().clone()


def rows_of(path):
    return torch.from_numpy(tensors_of(path)["centers"])


def tensors_of(path):
    from safetensors.numpy import load_file

    return load_file(path / "centers_0000000000.safetensors")


def test_identities_are_removed_merged_renumbered_and_added(trained, tmp_path):
    """0 stays, 1 and 2 become 1, 3 is removed, the others move, 40 to 42 are new."""
    before = centers_of(trained)
    table = [(0, 0), (1, 1), (2, 1), *((old, old - 2) for old in range(4, len(before)))]
    lines = "".join(f"{old},{new}\n" for old, new in table)
    (tmp_path / "map.csv").write_text("old,new\n" + lines)
    out, count = tmp_path / "start", len(before) + 3
    arguments = [str(trained), str(out), "--map", str(tmp_path / "map.csv")]
    assert identities.main([*arguments, "--identities", str(count)]) == 0
    assert checkpoint.verify(out) is None
    after = rows_of(out)
    assert len(after) == count
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2 : len(before) - 2], before[4:])
    merged = F.normalize(F.normalize(before[1:3]).sum(0), dim=0)
    assert torch.allclose(F.normalize(after[1], dim=0), merged, atol=1e-6)
    assert torch.allclose(after[1].norm(), before[1:3].norm(dim=1).mean())
    fresh = torch.empty(count, before.shape[1])
    fill_initial_(fresh, range(count), seed=2048, device=fresh.device)
    assert torch.equal(after[len(before) - 2 :], fresh[len(before) - 2 :])


class Lengths(TorchDispatchMode):
    """The most rows of a width that any tensor has which is made meanwhile."""

    def __init__(self, width):
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.shape[-1:] == (self.width,):
                self.most = max(self.most, one.numel() // self.width)
        return made


@pytest.mark.parametrize("identities_of_a_piece", [3, 7])
def test_pieces_of_any_size_give_the_same_bytes(
    packs, trained, tmp_path, monkeypatch, identities_of_a_piece
):
    """All rows were in memory five times. Here old ones come from anywhere, some are merged, and
    the last pieces have none."""
    count = len(centers_of(trained))
    order = np.random.default_rng(3).permutation(count)
    lines = [f"{old},{order[old] if old % 5 else order[old - old % 10]}\n" for old in range(count)]
    (tmp_path / "map.csv").write_text("".join(lines[:-4]))
    words = [str(trained), "--map", str(tmp_path / "map.csv"), "--identities"]
    ways = {
        "mean": [*words, str(count), "--mean-of", str(packs / "train.rec")],
        "fresh": [*words, str(count + 20)],
    }
    for name, way in ways.items():
        assert identities.main([*way, str(tmp_path / name)]) == 0
    width = centers_of(trained).shape[1]
    monkeypatch.setattr(stored_rows, "_PIECE_BYTES", 4 * width * identities_of_a_piece)
    for name, way in ways.items():
        whole, pieces = tmp_path / name, tmp_path / f"{name} in pieces"
        assert identities.main([*way, str(pieces)]) == 0
        files = sorted(path.name for path in whole.iterdir())
        assert files == sorted(path.name for path in pieces.iterdir())
        for file in files:
            assert (whole / file).read_bytes() == (pieces / file).read_bytes(), file

    with identities.open_run(trained, heads=False) as opened, Lengths(width) as lengths:
        stored = stored_rows.StoredRows(opened.place, opened.config)
        old, every = identities.OldRows(stored, tmp_path), np.arange(count)
        rows = identities.new_rows(old, stored, every, every, count, None)
        assert sum(len(piece) for piece in rows) == count
    assert 0 < lengths.most <= max(8, identities_of_a_piece)
    assert torch.equal(old[every].flatten(0, 1), centers_of(trained))


def test_what_fails_while_rows_are_made_leaves_nothing(packs, trained, tmp_path, monkeypatch):
    count = len(centers_of(trained))
    lines = [f"{old},{old}\n" for old in range(count - 1)]
    (tmp_path / "map.csv").write_text("".join(lines))
    words = [str(trained), str(tmp_path / "x"), "--map", str(tmp_path / "map.csv")]
    words += ["--mean-of", str(packs / "train.rec"), "--identities", str(count)]
    monkeypatch.setattr(identities, "mean_embeddings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        identities.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["map.csv"]


def test_an_added_identity_without_an_image_is_named_before_any_is_embedded(
    packs, trained, tmp_path, monkeypatch, capsys
):
    """Labels are read once: a pack has a page of memory for each of its headers."""
    count = len(centers_of(trained))
    (tmp_path / "map.csv").write_text("0,1\n")
    jpeg = open_pack(packs / "train.rec").jpeg(0)
    few = [(identity, jpeg) for identity in range(count) if identity not in (1, count - 2)]
    write_insightface_pack(tmp_path / "few.rec", few, count)
    words = ["identities", str(trained), str(tmp_path / "x"), "--identities", str(count)]
    words += ["--map", str(tmp_path / "map.csv")]
    monkeypatch.setattr(identities, "mean_embeddings", lambda *_: 1 / 0)
    assert main([*words, "--mean-of", str(tmp_path / "few.rec")]) == DataError.exit_code
    assert f"few.rec: identity {count - 2} has no image in it" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_added_identities_begin_with_the_mean_of_their_images(packs, trained, tmp_path):
    """Identity 5 is taken out and added again: its images know more than chance does."""
    before = centers_of(trained)
    keep = [f"{old},{old}\n" for old in range(len(before)) if old != 5]
    (tmp_path / "map.csv").write_text("".join(keep))
    out = tmp_path / "start"
    arguments = [str(trained), str(out), "--map", str(tmp_path / "map.csv")]
    assert identities.main([*arguments, "--mean-of", str(packs / "train.rec")]) == 0
    after = rows_of(out)
    with identities.open_run(trained) as opened:
        pack = identities.open_pack(packs / "train.rec")
        mine = np.flatnonzero(pack.identities(np.arange(len(pack))) == 5)
        found = opened.evaluation.embed(opened.model, "x", len(mine), lambda i: pack.jpeg(mine[i]))
    mean = F.normalize(torch.from_numpy(found).float()).mean(0)
    assert torch.allclose(F.normalize(after[5], dim=0), F.normalize(mean, dim=0), atol=1e-5)
    assert torch.equal(after[:5], before[:5])


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        ("0,0\n0,1\n", [], "line 2: 0 occurs a second time"),
        ("99999,0\n", [], "old numbers must be in [0, "),
        ("a,b\n", [], "must be old,new"),
        ("0,1000000000000\n", [], "Is a new number too large?"),
        (f"0,{10**30}\n", [], "new ones in [0, "),
        ("0,7\n", ["--identities", "7"], "the largest new number is 7"),
    ],
)
def test_a_mistake_in_the_map_is_named(trained, tmp_path, capsys, lines, more, message):
    (tmp_path / "map.csv").write_text(lines)
    arguments = [str(trained), str(tmp_path / "x"), "--map", str(tmp_path / "map.csv"), *more]
    assert main(["identities", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_another_number_of_identities_names_the_tool(packs, trained, tmp_path):
    assert identities.main([str(trained), str(tmp_path / "s"), "--identities", "50"]) == 0
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["num_identities"] == 50
    done = run(packs, tmp_path / "r", "run.steps=3", f"run.start_from={tmp_path / 's'}")
    assert done.returncode == 2
    assert "partialfc identities --identities 40" in done.stderr
