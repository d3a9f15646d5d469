"""Code of a user's own, by the names that settings have for it: that of the page "Extend it"."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from torch import nn

from partialfc.backbones import build_backbone
from partialfc.checkpoint.recognition import Known
from partialfc.checkpoint.trained_backbone import TrainedBackbone, open_backbone
from partialfc.config import ConfigError, config_hash, load, to_toml
from partialfc.config.losses import Losses
from partialfc.config.tree import written
from partialfc.data.source import open_source
from partialfc.definitions import Range, plugins
from partialfc.definitions.signatures import taken
from partialfc.head.rows.rules import ROW_RULES, RowSGD
from partialfc.model.build import embedding_losses, margin_of, new_backbone, row_rule_of
from partialfc.monitoring.monitor import Monitor
from partialfc.records.ledger import Ledger
from partialfc.records.sinks.run_sink import SINKS, find
from partialfc.training.must_match import must_match
from tests.support.models import runtime
from tests.support.places import ROOT
from tests.support.processes import ENVIRONMENT, python
from tests.support.runs import TORCHRUN, UNVERIFIED, kill_all, losses
from tests.support.waiting import wait_for
from tests.test_docs import EXTENDING, blocks

CODE = "\n".join(blocks(EXTENDING, "python"))
(SETTINGS,) = blocks(EXTENDING, "toml")
DATA = '\n[data]\ntrain = "train.rec"\n'


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """What a test loads, the next one does not know."""
    modules = set(sys.modules)
    monkeypatch.setattr(plugins, "_loaded", {})
    plugins._version.cache_clear()
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("my_", "other_")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's module and settings, in the folder that the test is in."""
    (tmp_path / "my_faces.py").write_text(CODE)
    (tmp_path / "mine.toml").write_text(SETTINGS + DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def complaint(*overrides, file="mine.toml"):
    with pytest.raises(ConfigError) as error:
        load(file, overrides)
    return str(error.value)


def test_every_example_of_the_page_is_complete_in_about_twenty_lines():
    code = [block.strip().splitlines() for block in blocks(EXTENDING, "python")]
    classes = [
        [line for line in block if not line.startswith(("from ", "import "))] for block in code
    ]
    assert all(len([line for line in block if line.strip()]) <= 20 for block in classes)


def test_the_settings_of_the_page_build_what_they_name(folder):
    config = load("mine.toml")
    import my_faces

    assert config.backbone.options.width == 32
    assert isinstance(new_backbone(config), my_faces.Patches)
    assert margin_of(config) == my_faces.GrowingCosFace(scale=32, grow_steps=200)
    assert row_rule_of(config) == my_faces.RowSign()
    found = embedding_losses(config).losses
    assert {name: (type(one.loss), one.weight) for name, one in found.items()} == {
        "together": (my_faces.Together, 0.1),
        "apart": (my_faces.Together, 0.01),
    }


def test_resolved_settings_load_back_equal_and_have_one_hash(folder):
    config = load("mine.toml")
    Path("resolved.toml").write_text(to_toml(config))
    again = load("resolved.toml")
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert written(to_toml(config)) == config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "backbone.options.widht=3",
            "backbone.options.widht = 3 (command line): unknown setting. Did you mean "
            "backbone.options.width? [backbone.options] takes width.",
        ),
        (
            "backbone.options.width=0",
            "backbone.options.width = 0 (command line): must be an integer >= 1. Leave it out",
        ),
        ("backbone.options.width=wide", 'width = "wide" (command line): must be an integer >= 1'),
        ("backbone.name=my_faces:Pitches", 'backbone "my_faces:Pitches": my_faces has no Pitches.'),
        ("backbone.name=my_faces:Csv", "must be a class or a function that takes the keyword"),
        ("backbone.name=my_face:Patches", "plug-in my_face: there is no module my_face. Install"),
        ("run.plugins=faces/my.py", 'plug-in "faces/my.py": must be the name of a module'),
        (
            "head.margin.name=my_faces:Together",
            'head.margin.name = "my_faces:Together": must be a class that inherits from '
            "partialfc.margins.base.Margin.",
        ),
        (
            "head.margin.grow_steps=0",
            "head.margin.grow_steps = 0 (command line): must be an integer >= 1",
        ),
        ("head.margin.angular=0.1", "takes name, scale, additive, grow_steps."),
        ("losses.together.margin=1", "[losses.together] takes weight, name."),
        (
            "losses.nobodys.weight=1",
            "losses.nobodys = {weight = 1} (command line): unknown section",
        ),
        ("losses={scale={name='my_faces:Together'}}", "[losses.scale]: it must be a word"),
        ("losses={'a b'={name='my_faces:Together'}}", "[losses.a b]: it must be a word"),
        ("backbone.name=math:hypot", "must be a class or a function that takes the keyword"),
        ("log.sinks=nothing", 'log.sinks = "nothing": must be one of mlflow, wandb, or a class'),
    ],
)
def test_a_mistake_is_told_by_key_value_rule_and_remedy(folder, override, told):
    assert told in complaint(override)


def test_options_of_a_backbone_that_takes_none_are_refused(folder):
    Path("plain.toml").write_text(DATA)
    told = complaint("backbone.options.width=3", file="plain.toml")
    assert "unknown setting. [backbone.options] takes nothing." in told
    with pytest.raises(ValueError, match="width = 3: convnet_s has no such option"):
        build_backbone("convnet_s", width=3)


def test_a_module_that_fails_is_told_in_one_line(folder):
    Path("my_broken.py").write_text("import my_missing_friend")
    assert "plug-in my_broken: No module named 'my_missing_friend'." in complaint(
        "run.plugins=my_broken"
    )
    Path("my_wrong.py").write_text("1 / 0")
    assert "plug-in my_wrong cannot be imported: ZeroDivisionError" in complaint(
        "run.plugins=my_wrong"
    )


def test_names_of_a_plugin_are_names_in_settings_and_never_ours(folder):
    own = CODE + "\nBACKBONES = {'patches': Patches}\nSINKS = {'csv': Csv}"
    Path("my_names.py").write_text(own)
    Path("own.toml").write_text(DATA + "[run]\nplugins = ['my_names']\n")
    config = load("own.toml", ["backbone.name=patches", "log.sinks=['csv']"])
    import my_names

    assert isinstance(new_backbone(config), my_names.Patches)
    assert find(config.log.sinks) == {"csv": my_names.Csv}
    Path("my_twins.py").write_text("from my_names import *")
    twice = ["run.plugins=['my_names', 'my_twins']", "backbone.name=patches"]
    assert "my_names and my_twins both have it in BACKBONES" in complaint(*twice, file="own.toml")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("backbone", "convnet_s"), ("backbone", "timm/x"), ("loss", "center"), ("row rule", "sgd")],
)
def test_a_plugin_with_one_of_our_names_is_refused(folder, kind, name):
    """It would never be used, and nobody would be told."""
    registry = plugins.REGISTRIES[kind]
    Path("my_thief.py").write_text(f"{registry} = {{{name!r}: int}}")
    for _ in range(2):  # the second time it is in memory
        told = complaint("run.plugins=my_thief")
        assert f'plug-in my_thief: {registry} has "{name}", which is a {kind} of ours' in told


def test_a_plugin_may_look_at_our_dictionaries(folder):
    Path("my_reader.py").write_text("from partialfc.losses import LOSSES")
    assert load("mine.toml", ["run.plugins=my_reader"]).run.plugins == ("my_reader",)


def test_our_names_are_those_that_settings_have():
    ours = plugins._OURS
    assert ours["row rule"] == {*ROW_RULES}
    assert ours["sink"] == {*SINKS}
    assert ours["loss"] == {*Losses.model_fields}


def test_parameters_are_settings_if_a_file_can_have_them():
    def constructor(
        *,
        depths: list[int] = [1, 2],  # noqa: B006
        kind: Literal["a", "b"] = "a",
        path: Path | None = None,
        rate: Annotated[float, Range(ge=0, lt=1)] = 0.1,
        untyped=3,
        activation: type = nn.ReLU,
        **others,
    ):
        return None

    assert list(taken(constructor)) == ["depths", "kind", "path", "rate", "untyped"]
    assert taken(constructor)["untyped"] == (int, 3)

    def needs(table: dict):
        return None

    with pytest.raises(ValueError, match="its table needs a type that settings have"):
        taken(needs)


def test_a_switch_that_a_backbone_lacks_is_not_ignored(folder):
    plugins.load(["my_faces"])
    with pytest.raises(ValueError, match=r"checkpoint_activations = true: .*no such switch"):
        build_backbone("my_faces:Patches", checkpoint_activations=True)


def test_what_lies_beside_a_checkpoint_imports_nothing(folder):
    """Whoever opens a stranger's run has not asked for its code."""
    Path("my_trap.py").write_text("open('sprung', 'w').close()")
    run = folder / "run"
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    text = to_toml(load("mine.toml"))
    (run / "config.toml").write_text(text.replace('"my_faces"', '"my_trap"'))
    with pytest.raises(ConfigError, match=r"name the plug-in my_trap: .*--plugin my_trap"):
        open_backbone(run)
    assert written(text.replace("my_faces", "my_trap")) is None, "settings of a checkpoint"
    assert not Path("sprung").exists()
    told = python("-m", "partialfc", "embed", run, folder, "--out", "a.npy", cwd=folder)
    assert told.returncode == 2
    assert "--plugin my_trap" in told.stderr
    assert not Path("sprung").exists()


def test_a_subclass_of_row_sgd_is_not_run_by_the_kernel_of_sgd(monkeypatch):
    """It says how a row moves; the kernels know SGD alone."""
    from partialfc import ArcFace, PartialFC
    from partialfc.head import partial_fc

    class Own(RowSGD):
        @staticmethod
        def update_(group, row_TD, gradient_TD, states):
            raise AssertionError

    asked = []
    decide = partial_fc.decide
    monkeypatch.setattr(
        partial_fc, "decide", lambda *a, **k: asked.append(k["sgd"]) or decide(*a, **k)
    )
    for rule in (RowSGD(), Own()):
        PartialFC(8, 4, ArcFace(), optimizer=rule)
    assert asked == [True, False]


def test_options_at_their_defaults_are_no_fact_of_a_checkpoint(folder):
    """So that an older run goes on where a backbone has got an option."""
    plain, other = load("mine.toml", ["backbone.options.width=64"]), load("mine.toml")
    data = SimpleNamespace(fingerprint="", labels_fingerprint="")
    assert must_match(plain, data)["backbone.options"] is None
    assert must_match(other, data)["backbone.options"] == {"width": 32}


def test_prometheus_is_told_the_losses_of_a_plugin(folder):
    config = load("mine.toml", ["monitor.port=0", "precision.compute=fp32"])
    monitor = Monitor(config, runtime(), Ledger(None), 1)
    monitor.write(1, {"loss": 2.0, "loss_together": 1.5})
    samples = [sample for family in monitor._exporter.collect() for sample in family.samples]
    monitor.close()
    found = {sample.labels["loss"]: sample.value for sample in samples if "loss" in sample.labels}
    assert found == {"together": 1.5}


def test_images_of_a_plugin_are_refused_by_name():
    with pytest.raises(ValueError, match=r"images are not read by a plug-in.*partialfc pack"):
        open_source(Path("my_faces:Images"))


def test_the_version_of_a_package_is_that_of_all_its_source(folder):
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '1.2'")
    (package / "nets.py").write_text("")
    plugins.load(["my_package.nets"])
    before = plugins.versions()["my_package.nets"]
    assert re.fullmatch(r"1\.2, source [0-9a-f]{12}", before)
    (package / "parts.py").write_text("x = 1")
    plugins._version.cache_clear()
    assert plugins.versions()["my_package.nets"] != before


def start(packs, folder, *more, command="train"):
    """The words of a command on a short run of all that the page has, in the module's folder."""
    data = {
        "train": str(packs / "train.rec"),
        "global_batch": 24,
        "image_size": 32,
        "images_per_identity": 2,
        "loader": "torch",
    }
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    return [
        *("-m", "partialfc", command, folder / "mine.toml", *overrides),
        f"verification.pairs=['{packs / 'heldout_pairs.bin'}']",
        f"run.folder={folder / 'run'}",
        "backbone.embedding_dim=32",
        "precision.compute=fp32",
        "head.sample_rate=0.5",
        "log.every_steps=1",
        "checkpoint.every_steps=2",
        *more,
    ]


def manifest_of(folder, step):
    path = folder / "run" / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    return json.loads(path.read_text())


def test_a_buffer_that_no_file_has_is_its_constructors(folder):
    """Built on the meta device, it would have no values."""
    Path("my_buffers.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, embedding_dim: int):\n"
        "        super().__init__(2, embedding_dim)\n"
        "        self.register_buffer('two', torch.full((1,), 2.0), persistent=False)\n"
    )
    plugins.load(["my_buffers"])
    state = build_backbone("my_buffers:Net", embedding_dim=3).state_dict()
    known = Known("my_buffers:Net", 3, 112)
    built = TrainedBackbone(Path("x"), known, state).backbone()
    assert built.two.item() == 2.0
    assert torch.equal(built.weight, state["weight"])


@pytest.mark.distributed
def test_a_run_of_the_page_goes_on_with_another_count_and_other_source(packs, folder):
    """It says that the code is another one; report and checkpoint have both versions."""
    begun = python(*start(packs, folder, "run.steps=2", *UNVERIFIED), ranks=2, cwd=folder)
    assert begun.returncode == 0, begun.stderr
    (before,) = manifest_of(folder, 2)["versions"]["plugins"].values()
    (folder / "my_faces.py").write_text(CODE + "\n__version__ = '2.0'\n")
    done = python(*start(packs, folder, "run.steps=4"), cwd=folder)
    assert done.returncode == 0, done.stderr
    now = manifest_of(folder, 4)["versions"]["plugins"]["my_faces"]
    assert now.startswith("2.0, source ")
    assert f"the plug-in my_faces is another one: {now}, was {before}." in done.stdout
    assert "written by 2 ranks, going on with 1" in done.stdout
    assert {"loss", "loss_together", "loss_apart"} <= metrics_of(folder, 4).keys()
    report = (folder / "run" / "report.html").read_text()
    assert "plug-in my_faces" in report
    assert now in report
    lines = (folder / "run" / "numbers.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines if "train/loss," in line} == {"1", "2", "3", "4"}


def metrics_of(folder, step):
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {key: value for line in lines if line["step"] == step for key, value in line.items()}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plugin_from_torchrun_and_sigkill_to_every_command(packs, folder):
    """Trained on 2 ranks, killed, gone on with 1, then known to every command that opens a run."""
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{folder}:{ROOT}"}
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node=2", *map(str, start(packs, folder, "run.steps=100000"))],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = folder / "run" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("step_*")))
    kill_all(process)
    newest = max(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))
    assert 0 < newest < 100_000, "it was killed before its end"
    last = newest + 20
    done = python(*start(packs, folder, f"run.steps={last}"), cwd=folder)
    assert done.returncode == 0, done.stderr
    found = losses(folder / "run")
    assert found.keys() == set(range(1, last + 1))
    run, images = folder / "run", packs / "heldout.rec"
    for words in (
        ("export", run, "exported", "--formats", "onnx,safetensors", "--plugin", "my_faces"),
        ("embed", run, images, "--out", "a.npy", "--plugin", "my_faces"),
        ("evaluate", run, images, "--plugin", "my_faces"),
        ("identities", run, "carried", "--plugin", "my_faces"),
        ("report", run, "--out", "again.html"),
    ):
        if "--plugin" in words:
            one = python("-m", "partialfc", *words[:-2], cwd=folder)
            assert one.returncode == 2, words
            assert "--plugin my_faces" in one.stderr
        one = python("-m", "partialfc", *words, cwd=folder)
        assert one.returncode == 0, f"{words}: {one.stdout}{one.stderr}"
    needed = start(packs, folder, "--gpu", "h200", command="estimate")
    assert python(*needed, cwd=folder).returncode == 0
