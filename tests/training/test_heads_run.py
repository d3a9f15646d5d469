"""A run with three heads on three sets, as a user starts it."""

import json

import numpy as np
import pytest

from partialfc.__main__ import main
from partialfc.checkpoint.folder import read_manifest
from partialfc.data.dataset import open_dataset
from partialfc.data.images.formats import decode_image
from tests.support.runs import UNVERIFIED, killed_at, losses, run
from tools.bench._faults.runs import tensors

pytestmark = pytest.mark.distributed


def three(packs, folder):
    """10, 8 and 6 images of a batch, of 40 and 6 identities and 12 clusters; own rules for each."""
    labels = folder / "clusters" / "labels.npy"
    if not labels.exists():
        data = open_dataset([packs / "heldout_rotated.rec"])
        pixels = [decode_image(data.jpeg_view(n)).mean(2).ravel() for n in range(len(data))]
        np.save(folder / "pixels.npy", np.stack(pixels).astype(np.float32))
        where = ["--clusters", "12", "--out", str(labels.parent)]
        assert main(["cluster", str(folder / "pixels.npy"), *where]) == 0
    return (
        "data.train=",
        "head=",
        "data.sets={"
        f"letters={{train='{packs / 'train.rec'}', images=10}}, "
        f"others={{train='{packs / 'heldout.rec'}', images=8}}, "
        f"turned={{train='{packs / 'heldout_rotated.rec'}', images=6, labels='{labels}'}}}}",
        "heads={letters={sample_rate=0.5, weight=2.0, "
        "centers_in='host', optimizer={name='sgd', momentum_format='int8'}}, "
        "others={ranks=1, margin={name='curricularface', scale=16.0}, "
        "optimizer={name='adamw', lr_factor=0.01}}, "
        "turned={ranks=2, margin={name='cosface', scale=16.0}, weight=0.5}}",
        "losses.center.weight=0.1",
        "run.steps=8",
        "checkpoint.every_steps=4",
        *UNVERIFIED,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_three_heads_are_killed_and_go_on_bit_for_bit(ranks, packs, tmp_path):
    """Characters, others and clusters of images: one head on every rank and two on some."""
    straight, killed, settings = tmp_path / "straight", tmp_path / "killed", three(packs, tmp_path)
    done = run(packs, straight, *settings, ranks=ranks)
    assert done.returncode == 0, done.stderr
    dead = killed_at(6, packs, killed, *settings, ranks=ranks)
    assert dead.returncode == -9, dead.stderr
    done = run(packs, killed, *settings, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "step_00000004" in done.stdout
    one, other = (tensors(folder, 8) for folder in (straight, killed))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name


@pytest.mark.slow
def test_three_heads_go_on_with_other_numbers_of_ranks(packs, tmp_path, capsys):
    straight, settings = tmp_path / "straight", three(packs, tmp_path)
    done = run(packs, straight, *settings, ranks=2)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(straight / "checkpoints" / "step_00000008")
    assert {name: of["num_identities"] for name, of in manifest["heads"].items()} == {
        "letters": 40,
        "others": 6,
        "turned": 12,
    }
    assert "head_others.safetensors" in manifest["files"]  # what CurricularFace remembers
    _says_each_head(straight)
    for ranks, steps in ((4, 10), (1, 12)):
        done = run(packs, straight, *settings, f"run.steps={steps}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert list(losses(straight)) == [*range(1, 13)]
    assert main(["clean", str(straight), "--out", str(tmp_path / "clean")]) == 2
    assert "the run has the heads letters, others, turned" in capsys.readouterr().err
    done = run(packs, straight, *settings, "run.steps=13", "heads.others.sample_rate=0.5")
    assert done.returncode == 4
    assert "heads.others.sample_rate = 1.0, this run has 0.5" in done.stderr


def _says_each_head(folder):
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    parts = (record[f"loss_{name}"] for name in ("letters", "others", "turned"))
    weighted = sum(w * part for w, part in zip((2.0, 1.0, 0.5), parts, strict=True))
    assert record["loss"] == pytest.approx(weighted, rel=1e-5)
    assert record["loss_letters_center"] > 0
    assert "[head]" not in (folder / "config.toml").read_text()
    report = (folder / "report.html").read_text()
    assert "heads.letters, without its weight" in report
    assert "heads.letters: center, without its weight" in report


def test_estimate_wants_the_identities_of_each_head(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(
        "[data]\nglobal_batch = 16\n"
        '[data.sets.faces]\ntrain = "a.rec"\nimages = 12\n'
        '[data.sets.things]\ntrain = "b.rec"\nimages = 4\n'
        "[heads.faces]\nsample_rate = 0.1\n[heads.things]\n"
        '[backbone]\nname = "convnet_s"\n'
    )
    ask = ["estimate", str(path), "--gpu", "h200", "--json", str(tmp_path / "out.json")]
    assert main([*ask, "--identities", "faces=1000000,things=5000"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    rows = {
        group: next(item["origin"] for item in found["memory"][group])
        for group in ("heads.faces", "heads.things")
    }
    assert "1,000,000 x 512" in rows["heads.faces"]
    assert "5,000 x 512" in rows["heads.things"]
    assert {"heads.faces: products", "heads.things: rows"} <= {
        one["name"] for one in found["seconds"]
    }
    assert main([*ask, "--identities", "1000000"]) == 2
    assert "--identities faces=N,things=N" in capsys.readouterr().err
