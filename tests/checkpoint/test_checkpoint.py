"""One rank's checkpoints; tests/distributed moves them between world sizes."""

import hashlib
import json
import re
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from partialfc.checkpoint import CheckpointError, Saver, saving
from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.parts import parts_of
from partialfc.checkpoint.tensor_file import write_tensors
from partialfc.errors import DamagedError
from partialfc.head import Nearest
from partialfc.model.step import train_step
from tests.support.models import batch, flat_model, runtime, settings, weights
from tests.support.waiting import PATIENCE, wait_for
from tools.bench._faults.crash import corruptions, crash_points
from tools.bench._faults.disk import FullDisk

FACTS = {"pack": "abc", "run.seed": 2048}


def trained(steps=1):
    config, model = settings(), flat_model(settings())
    for step in range(steps):
        train_step(model, config, *batch(step, 24), 0.05)
    return model


def save(folder, step, model=None, keep=9):
    return checkpoint.save(folder, step, model or trained(), FACTS, runtime(), keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_and_the_runs_own_settings_stay(tmp_path):
    model = trained(3)
    path = save(tmp_path, 3, model)
    other = flat_model(settings())
    other.optimizer.param_groups[0]["momentum"] = 0.5
    assert checkpoint.load(path, other, FACTS, runtime()) == 3
    assert all(map(torch.equal, weights(other), weights(model)))
    assert other.head.optimizer.steps == 3
    assert other.optimizer.param_groups[0]["momentum"] == 0.5


def test_a_step_that_was_fixed_ahead_is_forgotten_with_the_state_it_was_of(tmp_path):
    """It would have the identities of another batch."""
    path, other = save(tmp_path, 1), flat_model(settings())
    other.head.sample_step(torch.tensor([3, 4]), ahead=True)
    checkpoint.load(path, other, FACTS, runtime())
    other.head.sample_step(torch.tensor([7, 8]))
    other.head(torch.randn(2, other.head.embedding_dim), torch.tensor([7, 8]))


def test_states_keep_the_memory_layout_of_their_parameter(tmp_path):
    """torch's fused kernels pair elements by memory order and do not look at strides."""
    model = trained()
    weight = model.backbone.project.weight
    save(tmp_path, 1, model)
    other = flat_model(settings())
    other.backbone.project.weight.data = other.backbone.project.weight.data.T.contiguous().T
    checkpoint.load(tmp_path / "step_00000001", other, FACTS, runtime())
    restored = other.backbone.project.weight
    state = other.optimizer.state[restored]["momentum_buffer"]
    assert state.stride() == restored.stride() != weight.stride()
    assert torch.equal(state, model.optimizer.state[weight]["momentum_buffer"])


def rewritten(path, file, change):
    """Change the tensors of one file of a checkpoint, and all that is said of it."""
    values = change(load_file(path / file))
    save_file(values, path / file)
    data = (path / file).read_bytes()
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    about["tensors"] = sorted(values)
    signed(path, lambda manifest: manifest["files"][file].update(about))


def test_states_go_by_the_name_of_their_parameter(tmp_path):
    """A number counts others as soon as parameters are frozen or grouped in another way."""
    model = trained(2)
    path = save(tmp_path, 2, model)
    names = {f"project.{name}.momentum_buffer" for name in ("weight", "bias")}
    assert load_file(path / "optimizer.safetensors").keys() == names
    other = flat_model(settings())
    (group,) = other.optimizer.param_groups
    group["params"].reverse()
    other.backbone.project.weight.requires_grad_(False)
    checkpoint.load(path, other, FACTS, runtime())
    bias = other.backbone.project.bias
    own = model.optimizer.state[model.backbone.project.bias]["momentum_buffer"]
    assert torch.equal(other.optimizer.state[bias]["momentum_buffer"], own)


def test_a_checkpoint_with_states_by_number_goes_on(tmp_path):
    """Format 3 counts the parameters that are trained, in the backbone's order."""
    model = trained(3)
    path = save(tmp_path, 3, model)
    numbers = {"project.weight": "0", "project.bias": "1"}
    rewritten(
        path,
        "optimizer.safetensors",
        lambda values: {
            f"{numbers[name.rpartition('.')[0]]}.momentum_buffer": value
            for name, value in values.items()
        },
    )
    signed(path, lambda manifest: manifest.update(format=3))
    assert checkpoint.newest(tmp_path, runtime()) == path
    other = flat_model(settings())
    checkpoint.load(path, other, FACTS, runtime())
    assert all(map(torch.equal, weights(other), weights(model)))
    other.backbone.project.weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="of 2 parameters by number, and this run trains 1"):
        checkpoint.load(path, other, FACTS, runtime())


def test_a_state_of_another_shape_is_refused(tmp_path):
    """torch's fused kernels would read beyond its end."""
    path = save(tmp_path, 1)
    rewritten(
        path, "optimizer.safetensors", lambda values: {k: v[:1].clone() for k, v in values.items()}
    )
    with pytest.raises(CheckpointError, match=r"momentum_buffer \[1, 192\] of project.weight"):
        checkpoint.load(path, flat_model(settings()), FACTS, runtime())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 8}, r"centers is \[40, 16\], and backbone.embedding_dim .* wants \[40, 8\]"),
        (
            {"negatives": Nearest(neighbours=2)},
            r"neighbours is \[40, 3\], and head.nearest.neighbours .* wants \[40, 2\]",
        ),
    ],
    ids=["dim", "neighbours"],
)
def test_rows_of_another_width_are_another_run_and_no_damage(tmp_path, change, words):
    """A start took the checkpoint before, and renamed newer ones that were as they were written."""
    negatives = {"negatives": Nearest(neighbours=3)}
    path = save(tmp_path, 1, flat_model(settings(), **negatives))
    other = flat_model(settings(), **{**negatives, **change})
    words = f"centers_0000000000.safetensors: {words}"
    with pytest.raises(CheckpointError, match=words) as found:
        checkpoint.read_centers(path, checkpoint_folder.read_manifest(path), other.head)
    assert not isinstance(found.value, DamagedError)
    if "dim" not in change:  # the backbone is looked at before
        with pytest.raises(CheckpointError, match=words) as found:
            checkpoint.load(path, other, FACTS, runtime())
        assert not isinstance(found.value, DamagedError)


def test_only_the_newest_are_kept_and_only_checkpoints_are_touched(tmp_path):
    (tmp_path / "step_00000001_best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["notes.txt", "step_00000001_best", "step_00000003", "step_00000010"]
    assert checkpoint.newest(tmp_path, runtime()).name == "step_00000010"


def test_a_corrupt_newest_one_is_set_aside_and_its_step_can_be_written_again(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "backbone.safetensors").write_bytes(b"short")
    assert checkpoint.newest(tmp_path, runtime()).name == "step_00000001"
    assert "backbone.safetensors has 5 bytes" in capsys.readouterr().out
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [".step_00000002.invalid", "step_00000002"]
    assert checkpoint.verify(tmp_path / "step_00000002") is None


def test_when_none_is_valid_nothing_is_touched(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in it is valid"):
        checkpoint.newest(tmp_path, runtime())
    assert names(tmp_path) == ["step_00000001"]


def test_a_look_from_outside_touches_nothing(tmp_path, capsys):
    """Another process may be writing what looks like a leftover."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "backbone.safetensors").write_bytes(b"short")
    (tmp_path / ".step_00000003.partial").mkdir()
    before = names(tmp_path)
    assert checkpoint.newest(tmp_path, runtime(), tidy=False).name == "step_00000001"
    assert names(tmp_path) == before


def test_what_a_kill_left_is_removed(tmp_path):
    save(tmp_path, 1)
    for leftover in (".step_00000002.partial", ".step_00000000.deleted"):
        (tmp_path / leftover / "x").mkdir(parents=True)
    checkpoint.newest(tmp_path, runtime())
    assert names(tmp_path) == ["step_00000001"]


def test_no_checkpoint_is_overwritten(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no checkpoint is ever overwritten"):
        save(tmp_path, 1)
    assert checkpoint.verify(tmp_path / "step_00000001") is None


def test_every_damage_is_found(tmp_path, capsys):
    """R6: flipped, cut, grown, zeroed, missing and swapped files; the one before is found."""
    accepted = [what for what, taken in corruptions(tmp_path, runtime(), 120) if taken]
    assert not accepted
    said = capsys.readouterr().out
    for file in ("backbone.safetensors", "centers_0000000000.safetensors", "manifest.json"):
        assert f"not a valid checkpoint: {file}" in said


def test_an_edited_manifest_is_found(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "step": 2}))
    assert "manifest.json is corrupt" in checkpoint.verify(path)


@pytest.mark.parametrize(
    "power",
    [
        pytest.param(False, id="the process dies"),
        pytest.param(True, id="the machine dies", marks=pytest.mark.slow),
    ],
)
def test_a_save_may_die_at_every_operation(tmp_path, power):
    """R5, R8: every write, sync, rename and removal, those of the purge too."""
    problems = list(crash_points(tmp_path, runtime(), power=power))
    assert len(problems) > 25
    assert not any(problems)


def signed(path, change):
    """Change a manifest and sign it again, as no accident does."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest.pop("sha256", None)
    digest = checkpoint_folder.digest_of(manifest)
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_whatever_is_missing_is_named(tmp_path):
    """R3: every key of the manifest, every fact, every file and every tensor."""
    path = save(tmp_path, 1, trained(2))
    manifest = json.loads((path / "manifest.json").read_text())
    copy = tmp_path / "copies" / path.name

    def refused(change, name):
        shutil.copytree(path, copy)
        change(copy)
        try:
            if problem := checkpoint.verify(copy):
                assert name in problem
                return
            with pytest.raises(CheckpointError, match=re.escape(name)):
                checkpoint.load(copy, flat_model(settings()), FACTS, runtime())
        finally:
            shutil.rmtree(copy)

    for key in checkpoint_folder.KEYS - {"format"}:
        refused(lambda at, key=key: signed(at, lambda m: m.pop(key)), key)
    refused(lambda at: signed(at, lambda m: m.pop("format")), "format")
    for fact in FACTS:
        refused(lambda at, fact=fact: signed(at, lambda m: m["facts"].pop(fact)), fact)
    for file, about in manifest["files"].items():
        refused(lambda at, file=file: signed(at, lambda m: m["files"].pop(file)), "it ")
        for tensor in about["tensors"]:

            def drop(at, file=file, tensor=tensor, forget=False):
                values = load_file(at / file)
                del values[tensor]
                save_file(values, at / file)
                data = (at / file).read_bytes()
                about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                if forget:
                    about["tensors"] = sorted(values)
                signed(at, lambda m: m["files"][file].update(about))

            refused(drop, tensor)
            refused(lambda at, drop=drop: drop(at, forget=True), tensor)
    for file in parts_of(manifest):
        note = file.replace(".safetensors", ".json")
        refused(lambda at, file=file: (at / file).unlink(), file)
        refused(lambda at, note=note: (at / note).unlink(), note)
        for tensor in load_file(path / file):

            def drop(at, file=file, note=note, tensor=tensor):
                values = load_file(at / file)
                del values[tensor]
                for name in (file, note):
                    (at / name).unlink()
                said = write_tensors(at / file, values, Disk())
                checkpoint_folder.write_note(at / file, said, manifest["mark"], Disk())

            refused(drop, tensor)


def test_what_is_changed_after_save_returned_is_not_saved(tmp_path):
    """R9: a copy is written, not what training goes on with; leaving waits for it."""
    model = trained(3)
    before = weights(model)
    with Saver(tmp_path, FACTS, runtime(), keep=1) as saver:
        saver.save(3, model)
        for tensor in (*model.backbone.parameters(), model.head.centers):
            tensor.data.fill_(7)
        for optimizer in (model.optimizer, model.head.optimizer):
            for state in optimizer.state.values():
                for value in state.values():
                    value.fill_(7)
    other = flat_model(settings())
    checkpoint.load(tmp_path / "step_00000003", other, FACTS, runtime())
    assert all(map(torch.equal, weights(other), before))


def test_without_room_for_a_copy_the_live_tensors_are_written(tmp_path, monkeypatch, capsys):
    """Centers that fill the machine; training waits, so that nothing changes below the writer."""
    monkeypatch.setattr("partialfc.checkpoint.saving.available_bytes", lambda: 1000)
    model = trained(3)
    model.backbone.project.weight.data = model.backbone.project.weight.data.T.contiguous().T
    with Saver(tmp_path, FACTS, runtime(), keep=1) as saver:
        saver.save(3, model)
        assert not saver.pending
        assert not saver._copies
    assert "training stands still" in capsys.readouterr().out
    other = flat_model(settings())
    checkpoint.load(tmp_path / "step_00000003", other, FACTS, runtime())
    assert all(map(torch.equal, weights(other), weights(model)))


def test_a_failure_behind_the_training_is_raised_within_one_step(tmp_path):
    """R9: not at the next save, and not at the end of the run."""
    goes_on = threading.Event()

    class Broken(Disk):
        def sync(self, path):
            assert goes_on.wait(PATIENCE)
            super().sync(path)

        def rename(self, old, new):
            raise OSError(5, "Input/output error")

    with Saver(tmp_path, FACTS, runtime(), keep=1, disk=Broken()) as saver:
        saver.save(1, trained())
        saver.check()
        assert saver.pending, "it is written behind the training"
        goes_on.set()
        wait_for(lambda: not saver.pending)
        with pytest.raises(CheckpointError, match="Input/output error"):
            saver.check()
    assert not names(tmp_path)


def test_a_full_or_read_only_disk_says_what_is_needed_and_leaves_nothing(tmp_path):
    """R7: the checkpoint before it stays, the temporary folder goes."""
    save(tmp_path, 1)
    for capacity in (0, 100, 3000):
        with (
            pytest.raises(
                CheckpointError, match=r"No space left.*[1-9][\d,]* bytes needed by rank 0"
            ),
            Saver(tmp_path, FACTS, runtime(), keep=1, disk=FullDisk(capacity)) as saver,
        ):
            saver.save(2, trained())
        assert names(tmp_path) == ["step_00000001"]
    file = tmp_path / "a file"
    file.write_text("no folder can be here")
    with pytest.raises(CheckpointError, match="was not written"):
        save(file / "checkpoints", 1)


def test_some_checkpoints_are_kept_for_good(tmp_path):
    with Saver(tmp_path, FACTS, runtime(), keep=2, keep_every_steps=3) as saver:
        for step in range(1, 9):
            saver.save(step, trained())
    assert names(tmp_path) == [f"step_{step:08d}" for step in (3, 6, 7, 8)]


def test_the_files_are_safetensors(tmp_path):
    """What our writer writes, the library reads: every dtype, empty and scalar tensors."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    kinds += (torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn)
    tensors = {str(kind): torch.arange(-3, 9).to(kind).view(3, 4) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, tensors, Disk())
    assert written.bytes == path.stat().st_size
    assert written.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),)
    assert written.tensors == tuple(sorted(tensors))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_another_run_is_named_by_what_differs(tmp_path):
    path = save(tmp_path, 1)
    for facts, message in (
        ({**FACTS, "run.seed": 7}, "run.seed = 2048, this run has 7"),
        ({**FACTS, "new": 1}, "new = null, this run has 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path, flat_model(settings()), facts, runtime())
    with pytest.raises(CheckpointError, match="num_identities = 40, this run has 41"):
        checkpoint.load(path, flat_model(settings(), identities=41), FACTS, runtime())


def test_other_labels_are_another_run_where_a_checkpoint_knows_them(tmp_path):
    """Renumbered people would be trained onto each other's centers; older checkpoints go on."""
    path = save(tmp_path, 1)
    assert checkpoint.load(path, flat_model(settings()), FACTS | {"labels": "0f"}, runtime()) == 1
    model, facts = trained(2), FACTS | {"labels": "0f"}
    path = checkpoint.save(tmp_path, 2, model, facts, runtime(), keep=9)
    assert checkpoint.load(path, flat_model(settings()), facts, runtime()) == 2
    with pytest.raises(CheckpointError, match='with labels = "0f", this run has "1f"'):
        checkpoint.load(path, flat_model(settings()), facts | {"labels": "1f"}, runtime())


def test_copies_in_pinned_memory_are_counted_as_torch_locks_them(monkeypatch, tmp_path):
    """The next power of two: a host was given up to twice the copies that were thought to fit."""
    saver = object.__new__(saving.Saver)
    saver._copies, saver._folder = {}, tmp_path
    monkeypatch.setattr(saving, "available_bytes", lambda: 12 << 20)
    files = {"centers": {"one": SimpleNamespace(nbytes=(4 << 20) + 1, is_cuda=True)}}
    assert not saver._has_room(files)
    files["centers"]["one"].is_cuda = False
    assert saver._has_room(files)
