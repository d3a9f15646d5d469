"""Settings load, print and go back; every mistake gets a line with key, value, rule and remedy."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from partialfc.config import Config, ConfigError, config_hash, help_text, load, to_toml
from partialfc.config import tree as config
from partialfc.config.schema import Section, settings_of, table_of, takes, unit, variants
from partialfc.definitions.phrases import to_value

MINIMAL = '[data]\ntrain = "train.rec"\n'


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(text: str = MINIMAL, *overrides: str) -> Config:
    Path("run.toml").write_text(text, encoding="utf-8")
    return load("run.toml", overrides)


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(text, *overrides)
    return str(error.value)


# What loads


ARRAYS = """
[data]
kind = "arrays"
train = "a.npy"
labels = "labels.npy"
shape = [1, 40, 50]
[backbone]
name = "my:Network"
"""
SETS = """
[data.sets.a]
train = "a.rec"
share = 0.5
[data.sets.b]
train = "b.rec"
share = 0.5
"""
IDLE = 'negatives = "weighted"'
STAGES = """
[[stages]]
name = "all"
steps = 2
[[stages]]
name = "few"
steps = 2
head.sample_rate = 0.5
"""


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"{ARRAYS}[verification]\nflip = true\n", "verification.flip"),
        (f"{MINIMAL}[head]\n{IDLE}\n", "head.negatives"),
        (f'{MINIMAL}[head]\nsample_rate = 1.0\nnegatives = "nearest"\n', "head.negatives"),
        (f'{MINIMAL}[head]\nnearest.neighbours = 8\n{IDLE[:-9]}nearest"\n', "head.negatives"),
        (f"{SETS}[heads.a]\n{IDLE}\n[heads.b]\nsample_rate = 0.5\n{IDLE}\n", "heads.a"),
        (f"{MINIMAL}[head]\n{IDLE}\n{STAGES.replace('0.5', '1')}", "head.negatives"),
    ],
)
def test_what_an_earlier_version_wrote_is_opened_where_it_did_nothing(text: str, key: str) -> None:
    """A run writes its defaults down, too, and none of before could be measured or exported."""
    text = text.replace('"my:Network"', f'"{__name__}:network"')
    Path("config.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(key)):
        load("config.toml")
    found = load("config.toml", own=False)
    assert not (found.data.kind == "arrays" and found.verification.flip)
    assert found == load("config.toml", own=False) == config.written(text)
    for one in (found.head, *dict(found.heads).values()):
        assert (one.negatives == "weighted") == (one.sample_rate == 0.5)
    Path("config.toml").write_text(to_toml(found), encoding="utf-8")
    assert load("config.toml") == found


def test_negatives_that_a_stage_of_an_earlier_run_has_stay() -> None:
    Path("config.toml").write_text(f"{MINIMAL}[head]\n{IDLE}\n{STAGES}", encoding="utf-8")
    found = load("config.toml", own=False)
    assert [one.head.negatives for one in found.in_stages()] == ["uniform", "weighted"]
    assert found == load("config.toml")


def network(embedding_dim: int) -> None:
    """A backbone that is named and not made."""


@pytest.mark.filterwarnings("error")
def test_settings_made_in_code_have_the_options_of_their_backbone() -> None:
    """As those of a file: the section is known when the name is."""
    values = {"data": {"train": ["a.rec"]}, "backbone": {"name": "vit_b"}}
    made = Config(**values)
    assert made == Config.model_validate(values)
    assert made.backbone.options.model_dump() == {"masked": 0.05, "drop_path": 0.05}


def test_defaults_and_overrides() -> None:
    settings = loaded(MINIMAL + "[head]\nsample_rate = 0.1\n", "head.margin.scale=30", "run.seed=1")
    assert settings.head.sample_rate == 0.1
    assert settings.head.margin.scale == 30.0
    assert isinstance(settings.head.margin.scale, float)
    assert settings.run.seed == 1
    assert settings.data.global_batch == 1024
    assert settings.head.margin.name == "arcface"


def test_override_takes_bare_words_toml_and_nothing() -> None:
    settings = loaded(
        MINIMAL + "[run]\nepochs = 3\n",
        "backbone.name=vit_t",
        "run.folder=runs/x#1",
        'verification.pairs=["a.bin", "b c.bin"]',
        'head.margin={name="cosface", additive=0.35}',
        "run.epochs=",
        "run.steps=100",
        "run.steps=50",
    )
    assert settings.backbone.name == "vit_t"
    assert settings.run.folder == Path.cwd() / "runs/x#1"
    assert settings.verification.pairs == (Path.cwd() / "a.bin", Path.cwd() / "b c.bin")
    assert settings.head.margin.model_dump(include={"name", "additive"}) == {
        "name": "cosface",
        "additive": 0.35,
    }
    assert (settings.run.epochs, settings.run.steps) == (None, 50)


def test_override_cannot_smuggle_in_a_second_setting() -> None:
    """A newline in a value does not start a new TOML statement."""
    settings = loaded(MINIMAL, "monitor.port=0", "monitor.host=1\nvalue2 = 3")
    assert settings.monitor.host == "1\nvalue2 = 3"


def test_paths_are_relative_to_the_current_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    Path("configs").mkdir()
    Path("configs/run.toml").write_text('[data]\ntrain = "packs/train.rec"\n')
    settings = load("configs/run.toml", ["run.folder=~/runs"])
    assert settings.data.train == (Path.cwd() / "packs/train.rec",)
    assert settings.run.folder == Path("/home/me/runs")


def test_a_config_in_a_runs_folder_means_that_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was moved went on in the old folder, or began anew there."""
    for name in ("moved", "mine"):
        (tmp_path / name).mkdir()
        text = '[run]\nfolder = "/old/place"\n[data]\ntrain = "a.rec"\n'
        (tmp_path / name / "config.toml").write_text(text)
    moved = tmp_path / "moved" / "config.toml"
    (tmp_path / "moved" / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert load(moved).run.folder == tmp_path / "moved"
    said = "run.folder is the folder that it lies in, no longer /old/place."
    assert said in capsys.readouterr().err
    assert load(moved, ["run.folder=/new/place"]).run.folder == Path("/new/place")
    assert load(tmp_path / "mine" / "config.toml").run.folder == Path("/old/place")
    moved.write_text(text.replace("/old/place", str(tmp_path / "moved")))
    assert load(moved).run.folder == tmp_path / "moved"
    assert not capsys.readouterr().err


def test_nothing_can_be_changed() -> None:
    settings = loaded()
    with pytest.raises(ValidationError, match="frozen"):
        settings.head.margin.scale = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        settings.run = settings.run


# What goes back


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.steps=7", "head.canonical_shards=8", "monitor.port=9400"],
        ["head.margin.name=cosface", "head.margin.inter_class_filter=0.4"],
        ["optimizer.name=adamw", "head.optimizer.name=adamw", "optimizer.betas=[0.8, 0.99]"],
        ["schedule.name=polynomial", "precision.compute=fp16", "optimizer.lr=1e-30"],
        ["schedule.name=cosine", "precision.compute=fp32", f"optimizer.lr={1 / 3}"],
        [
            'verification.pairs=["a\\"b\\\\c.bin", "é\\u007F\\n😀.bin"]',
            "verification.every_steps=9",
        ],
    ],
)
def test_resolved_settings_load_back_equal_from_anywhere(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loaded(MINIMAL, *overrides)
    Path("resolved.toml").write_text(to_toml(settings), encoding="utf-8")
    monkeypatch.chdir("/")
    assert load(tmp_path / "resolved.toml") == settings


@given(st.text())
@hypothesis_settings(max_examples=50, deadline=None)
def test_any_text_survives_toml(text: str) -> None:
    settings = Config(data=config.Data(train=Path("a")), monitor=config.Monitor(port=0, host=text))
    Path("text.toml").write_bytes(to_toml(settings).encode())
    assert load("text.toml").monitor.host == text


def test_hash_is_that_of_the_training() -> None:
    same = [
        "run.folder=x",
        "run.threads=3",
        "log.every_steps=1",
        "data.prefetch=9",
        "run.seed=2048",
        "head.start=centers.npy",
    ]
    other = ["run.seed=1", "head.margin.scale=63.9", "optimizer.name=adamw", "data.global_batch=8"]
    reference = config_hash(loaded())
    assert len(reference) == 16
    assert all(config_hash(loaded(MINIMAL, override)) == reference for override in same)
    assert len({reference, *(config_hash(loaded(MINIMAL, override)) for override in other)}) == 5


def test_what_the_hash_leaves_out_exists() -> None:
    """A renamed setting must not slip into the hash."""
    known = {key for key, _ in settings_of(Config)} | {"data.sets"}
    for section, names in config._CHANGES_NO_RESULT.items():
        assert section in Config.model_fields
        assert names is True or set(keys_of(names, section)) <= known


def keys_of(names, prefix: str) -> Iterator[str]:
    for name in names:
        inner = names[name] if isinstance(names, dict) else True
        key = f"{prefix}.{name}"
        yield from [key] if inner is True else keys_of(inner, key)


# What is refused


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        (  # required
            "",
            [],
            "data.train: required, and not set. It takes a path or list of paths. The pack to "
            "train on, a .rec file with its .idx beside it; or a folder with a folder of images "
            "for each identity, or a list of lines path<TAB>identity. Add train = ... below "
            "[data], or data.train=... on the command line.",
        ),
        (  # unknown setting
            MINIMAL + "[checkpoint]\nkep = 3\n",
            [],
            "checkpoint.kep = 3: unknown setting. Did you mean checkpoint.keep? [checkpoint] takes "
            "every_steps, keep, keep_every_steps, shared, peers_every_steps, peers_folder.",
        ),
        (  # a known setting in the wrong section
            MINIMAL + "[head]\nembedding_dim = 256\n",
            [],
            "head.embedding_dim = 256: unknown setting. Did you mean backbone.embedding_dim? "
            "[head] takes start, sample_rate, negatives, canonical_shards, ranks_per_copy, "
            "compute, center_format, reduce_format, keep_mib, centers_in, states_in, host_folder, "
            "fused, overlap, [head.nearest], [head.several], [head.margin], [head.optimizer].",
        ),
        (  # what no sample asks for
            MINIMAL + "[head]\nsample_rate = 0.1\nnegatives = 'weighted'\nnearest.neighbours = 8\n",
            [],
            'head.nearest.neighbours = 8: head.negatives is "weighted". Set it to "nearest", or '
            "remove neighbours.",
        ),
        (  # a sample that is none
            MINIMAL + "[head]\nnegatives = 'weighted'\n",
            [],
            'head.negatives = "weighted" with head.sample_rate = 1: every class center is in each '
            "step and stands for itself. Set a lower sample_rate, or remove negatives.",
        ),
        (  # unknown section
            MINIMAL + "[sched]\nname = 'linear'\n",
            [],
            'sched = {name = "linear"}: unknown section. Did you mean schedule? The file takes '
            "[run], [data], [backbone], [precision], [head], [heads], [losses], [optimizer], "
            "[schedule], [verification], [checkpoint], [log], [monitor], [[stages]].",
        ),
        (  # out of range
            MINIMAL + "[head]\nsample_rate = 1.5\n",
            [],
            "head.sample_rate = 1.5: must be a number in (0, 1]. Leave it out for the default, "
            "1.0.",
        ),
        (  # degrees
            MINIMAL + "[head.margin]\nangular = 28.65\n",
            [],
            "head.margin.angular = 28.65: must be a number in [0, pi/2], in radians. If that is "
            "degrees, write angular = 0.5.",
        ),
        (  # wrong type, in quotes
            MINIMAL + '[run]\nsteps = "100"\n',
            [],
            'run.steps = "100": must be an integer >= 1, in steps. Write steps = 100.',
        ),
        (  # true is not a number
            MINIMAL + "[data]\nthreads = true\n".replace("[data]\n", ""),
            [],
            "data.threads = true: must be an integer >= 1, in threads. Leave it out for the "
            "default, 4.",
        ),
        (  # a float that is whole
            MINIMAL,
            ["run.steps=1e5"],
            "run.steps = 100000.0 (command line): must be an integer >= 1, in steps. Write steps = "
            "100000.",
        ),
        (  # a float that TOML does not know
            MINIMAL,
            ["optimizer.lr=.1"],
            'optimizer.lr = ".1" (command line): must be a number in (0, 100]. Write lr = 0.1.',
        ),
        (  # not finite
            MINIMAL,
            ["optimizer.lr=nan"],
            "optimizer.lr = nan (command line): must be a number in (0, 100]. Leave it out for the "
            "default, 0.1.",
        ),
        (  # what the field calls it
            MINIMAL,
            ["run.device=gpu"],
            'run.device = "gpu" (command line): must be "auto", "cpu" or "cuda". Write device = '
            '"cuda".',
        ),
        (  # a word of a list of words
            MINIMAL,
            ["data.loader=Daly"],
            'data.loader = "Daly" (command line): must be "auto", "dali" or "torch". Write loader '
            '= "dali".',
        ),
        (  # one where a list is meant
            MINIMAL,
            ["verification.pairs=lfw.bin"],
            'verification.pairs = "lfw.bin" (command line): must be a list of paths. Write pairs = '
            '["lfw.bin"].',
        ),
        (  # two wrong elements are one problem
            MINIMAL + "[verification]\npairs = [1, 2]\n",
            [],
            "verification.pairs = [1, 2]: must be a list of paths. Leave it out for the default, "
            "[].",
        ),
        (  # a pair of one
            MINIMAL + '[optimizer]\nname = "adamw"\nbetas = [0.9]\n',
            [],
            "optimizer.betas = [0.9]: must be a pair of numbers in [0, 1). Leave it out for the "
            "default, [0.9, 0.999].",
        ),
        (  # an empty path
            MINIMAL + "[run]\nfolder = ''\n",
            [],
            'run.folder = "": must be a path. Leave it out for the default, "runs/default".',
        ),
        (  # a number as a path
            MINIMAL,
            ["run.folder=2026"],
            'run.folder = 2026 (command line): must be a path. Write folder = "2026".',
        ),
        (  # unknown variant
            MINIMAL,
            ["head.margin.name=ArcFce"],
            'head.margin.name = "ArcFce" (command line): must be "arcface", "cosface", "combined", '
            '"softmax", "modified_softmax", "normalized_softmax", "l_softmax", "sphereface", '
            '"f_norm_sphereface", "adaface", "magface", "curricularface", "mv_softmax", '
            '"elasticface", "adacos", "subcenter_arcface" or "uniface". Did you mean "arcface"?',
        ),
        (  # a setting of another variant
            MINIMAL + "[head.margin]\nangular = 0.4\n",
            ["head.margin.name=cosface"],
            'head.margin.angular = 0.4: belongs to name = "arcface", "combined", "curricularface" '
            'or "subcenter_arcface", but name is "cosface". Remove it, or set head.margin.name to '
            'one of them. [head.margin] with name = "cosface" takes name, label_smoothing, scale, '
            "inter_class_filter, additive.",
        ),
        (  # the same, told apart by another word than name
            MINIMAL,
            ["precision.initial_loss_scale=1024"],
            'precision.initial_loss_scale = 1024 (command line): belongs to compute = "fp16", but '
            'compute is "bf16". Remove it, or set precision.compute = "fp16". [precision] with '
            'compute = "bf16" takes compute, tf32.',
        ),
        (  # a section that is not one
            MINIMAL + "[[head]]\nsample_rate = 0.1\n",
            [],
            "head = [{sample_rate = 0.1}]: must be a section. Write its settings below a line "
            "[head].",
        ),
        (  # two lengths
            MINIMAL + "[run]\nepochs = 20\n",
            ["run.steps=10"],
            "run.epochs = 20.0 with run.steps = 10: only one of the two may set the length of the "
            "run. Remove one (on the command line: run.epochs= or run.steps=).",
        ),
        (  # nothing to measure
            MINIMAL + "[verification]\nevery_steps = 500\n",
            [],
            "verification.every_steps = 500: there is no set to measure. List files in "
            "verification.pairs or verification.identification, or remove every_steps.",
        ),
        (  # nothing to serve
            MINIMAL,
            ["monitor.host=0.0.0.0"],
            'monitor.host = "0.0.0.0": nothing is served without a port. Set monitor.port, or '
            "remove host.",
        ),
        (  # no end of warm-up
            MINIMAL,
            ["run.steps=10", "schedule.warmup_steps=10"],
            "schedule.warmup_steps = 10: must be fewer than run.steps = 10, or the warm-up never "
            "ends.",
        ),
        (  # not an override
            MINIMAL,
            ["head.sample_rate"],
            "head.sample_rate (command line): an override is written key=value, e.g. run.seed=1.",
        ),
        (  # quotes lost in the shell
            MINIMAL,
            ["verification.pairs=[lfw.bin]"],
            "verification.pairs=[lfw.bin] (command line): the value is not valid TOML: Invalid "
            "value (at line 1, column 10). Text inside a list needs quotes, and the whole needs "
            """quotes for the shell: 'key=["a", "b"]'.""",
        ),
        (  # below a setting
            MINIMAL,
            ["data.train.path=x"],
            'data.train.path=x (command line): train = "train.rec" is a setting, not a section.',
        ),
        (  # leaving out what is not there
            MINIMAL,
            ["run.epoch="],
            "run.epoch= (command line): the file does not set this, so there is nothing to leave "
            "out.",
        ),
        (  # not TOML
            MINIMAL + "[optimizer]\nlr = 0,1\n",
            [],
            "not valid TOML: Expected newline or end of document after a statement (at line 4, "
            "column 7): lr = 0,1\n  A setting is written key = value: text in quotes "
            '("iresnet50"), a number with digits on both sides of its point (0.1), true and false '
            "in lower case.",
        ),
        (  # given twice
            MINIMAL + "threads = 1\nthreads = 2\n",
            [],
            "not valid TOML: Cannot overwrite a value (at end of document)\n  A section, and a "
            "setting within it, may be given only once.",
        ),
    ],
)
def test_message(text: str, overrides: list[str], line: str) -> None:
    if "overwrite" in line:  # newer Pythons know the line
        assert complaint(text, *overrides).startswith("run.toml: not valid TOML: Cannot overwrite")
    else:
        assert complaint(text, *overrides) == f"run.toml: {line}"


def test_all_problems_are_in_one_message_one_a_line() -> None:
    message = complaint("[run]\nseed = -1\n", "head.sample_rate=0", "nonsense", "checkpoint.kep=1")
    header, *lines = message.splitlines()
    assert header == "run.toml: 5 problems"
    begins = ["nonsense", "run.seed", "data.train", "head.sample_rate", "checkpoint.kep"]
    assert [line.split()[0].rstrip(":") for line in lines] == begins


def test_long_values_are_cut() -> None:
    message = complaint(MINIMAL, f"data.flip={'x' * 1000}")
    assert "..." in message
    assert len(message) < 200


def test_file_problems() -> None:
    Path("recipe.toml").write_text(MINIMAL)
    Path("binary.toml").write_bytes(b"a = '\xff'")
    Path("folder.toml").mkdir()
    expected = {
        "recpie.toml": "recpie.toml: no such settings file. Did you mean recipe.toml?",
        "missing/x.toml": "missing/x.toml: no such settings file. Check the path.",
        "folder.toml": "folder.toml: cannot be read: Is a directory.",
        "binary.toml": "binary.toml: byte 5 is not UTF-8. Settings are a text file in TOML.",
    }
    for path, message in expected.items():
        with pytest.raises(ConfigError) as error:
            load(path)
        assert str(error.value) == message


@example(key="\ud800", value="false")  # a byte of the command line that is not UTF-8
@given(
    key=st.sampled_from([key for key, _ in settings_of(Config)])
    | st.text(st.characters(exclude_characters="="), max_size=8),
    value=st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from(["adamw", "cosface", "polynomial", "fp16", "~nobody/x", "", "auto"]),
        st.lists(st.integers(-1, 1) | st.floats() | st.text(max_size=3), max_size=3),
        st.dictionaries(st.sampled_from(["name", "scale"]), st.integers()),
    ).map(to_value)
    | st.text(max_size=12),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_no_override_breaks_the_reader(key: str, value: str) -> None:
    """Either it loads, or a ConfigError in our words names the key."""
    Path("run.toml").write_text(MINIMAL)
    try:
        load("run.toml", [f"{key}={value}"])
    except ConfigError as error:
        message = str(error)
        assert key.split(".")[0].strip() in message
        for word in ("Input should", "type=", "pydantic", "Traceback", "Value error"):
            assert word not in message.replace(value, "").replace(key, "")


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@hypothesis_settings(deadline=None)
def test_no_file_breaks_the_reader(content: bytes) -> None:
    Path("any.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"any\.toml"):  # data.train at the least
        load("any.toml")


# What depends on the number of ranks


def test_check_of_the_number_of_ranks() -> None:
    settings = loaded(
        MINIMAL, "data.global_batch=99", "optimizer.accumulation=3", "head.canonical_shards=4"
    )
    with pytest.raises(ConfigError) as error:
        settings.check(8)
    assert str(error.value).splitlines() == [
        "data.global_batch = 99: must divide by ranks x optimizer.accumulation = 8 x 3 = 24. "
        "Nearest: 96 or 120. Or set data.uneven = true: ranks may have one image more.",
        "head.canonical_shards = 4: must be at least the number of ranks, 8. Leave it out, or set "
        "the largest number the run will ever have.",
    ]
    with pytest.raises(ConfigError, match=r"Nearest: 102\.$"):
        loaded(MINIMAL, "data.global_batch=100").check(102)
    loaded(MINIMAL, "data.global_batch=96", "optimizer.accumulation=3").check(8)
    with pytest.raises(ConfigError, match=r"BatchNorm takes .* over at least 2\. Use 16 or more"):
        loaded(MINIMAL, "data.global_batch=8", "optimizer.accumulation=2").check(4)
    synchronised = "backbone.sync_batch_norm=true"
    loaded(MINIMAL, "data.global_batch=8", "optimizer.accumulation=2", synchronised).check(4)


def test_check_of_copies_of_the_class_centers() -> None:
    """They divide the ranks, and each has as many images."""
    eight = (MINIMAL, "data.global_batch=96", "head.ranks_per_copy=8")
    for ranks in (4, 8, 16):
        loaded(*eight).check(ranks)
    with pytest.raises(ConfigError, match=r"^head\.ranks_per_copy = 8: .* 12 ranks .* as 6\."):
        loaded(*eight).check(12)
    loaded(MINIMAL, "head.ranks_per_copy=2", "head.canonical_shards=2").check(8)
    uneven = (MINIMAL, "data.uneven=true", "data.global_batch=100", "head.ranks_per_copy=8")
    with pytest.raises(ConfigError, match=r"copy = 8: .* have 48 to 52\. Choose a data\.global"):
        loaded(*uneven).check(16)


def test_check_of_shares_that_differ() -> None:
    """Any number of ranks that leaves each an image, or two where BatchNorm is one rank's."""
    uneven = (MINIMAL, "data.uneven=true", "data.global_batch=99", "optimizer.accumulation=3")
    assert loaded(*uneven).shares(8).sizes == (15,) + 7 * (12,)
    loaded(*uneven).check(8)
    loaded(*uneven).check(16)
    with pytest.raises(ConfigError, match=r"99: one image for each rank .* Use 102 or more"):
        loaded(*uneven).check(17)
    loaded(*uneven, "backbone.sync_batch_norm=true").check(33)
    with pytest.raises(ConfigError, match=r"34 x 3 = 102\. Nearest: 102\.$"):
        loaded(*uneven).check(34)
    pairs = ("losses.triplet.weight=1", "data.images_per_identity=3", "optimizer.accumulation=1")
    with pytest.raises(ConfigError, match=r"must divide the 50 images of a rank's micro-batch"):
        loaded(*uneven, *pairs).check(2)
    loaded(*uneven, *pairs).check(3)


# The schema itself


ALL = list(settings_of(Config))
"""Dotted key and field of every setting and tag, of every variant."""


def test_every_setting_says_what_it_means() -> None:
    undocumented = [key for key, field in ALL if len(field.description or "") < 10]
    assert undocumented == []


def test_every_number_has_a_range() -> None:
    """Also inside lists; the words of the rule are made from the bounds."""
    numbers = [takes(field) for _, field in ALL if re.search("integer|number", takes(field))]
    assert len(numbers) > 25
    assert [words for words in numbers if not re.search(r"[<>]|in [(\[]", words)] == []


def sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for field in section.model_fields.values():
        for variant in variants(field).values():
            yield from sections(variant)


def is_refused(section: type[Section], name: str, value: float) -> bool:
    try:
        section.model_validate({name: value})
    except ValidationError as error:
        return any(details["loc"] == (name,) for details in error.errors())
    return False


def test_every_range_ends_where_it_says() -> None:
    for section in sections(Config):
        for name, field in section.model_fields.items():
            for entry in field.metadata:
                for sign, outward in (
                    ("ge", -math.inf),
                    ("gt", math.inf),
                    ("le", math.inf),
                    ("lt", -math.inf),
                ):
                    bound = getattr(entry, sign, None)
                    if bound is None:
                        continue
                    is_float = takes(field).startswith("number")
                    step = 1 if outward > 0 else -1
                    beyond = math.nextafter(bound, outward) if is_float else bound + step
                    assert is_refused(section, name, bound) == (sign in ("gt", "lt")), name
                    assert is_refused(section, name, beyond) == (sign in ("ge", "le")), name


def test_help_gives_every_setting_with_type_unit_default_and_meaning() -> None:
    text = help_text()
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=\S)", text)]
    for key, field in ALL:
        name = key.split(".")[-1]
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            assert f"with {name} = {to_value(field.default)}" in text  # the tag of a variant
            continue
        default = f" = {to_value(field.default)}" if field.default is not None else ""
        default = " (required)" if field.is_required() else default
        meaning = " ".join((field.description or "").replace("``", "").split())
        expected = f"{key}{default} {takes(field)} {meaning}"
        assert any(entry.startswith(expected) for entry in entries), expected
        assert (unit(field) or "") in takes(field)
    assert max(map(len, text.splitlines())) <= 100


def test_first_variant_is_the_default() -> None:
    """Config() in Python and an empty file agree."""
    assert Config(data=config.Data(train=Path("train.rec"))) == loaded()
    assert all(variants(field) or table_of(field) for field in Config.model_fields.values())


def test_a_setting_of_a_loss_without_a_weight_is_refused() -> None:
    """It would be ignored silently."""
    with pytest.raises(ConfigError, match=r"losses\.triplet.*margin = 0\.3: has no effect"):
        loaded(MINIMAL, "losses.triplet.margin=0.3")
    assert loaded(MINIMAL, "losses.triplet.margin=0.3", "losses.triplet.weight=1").losses


def test_micro_batches_that_part_the_images_of_an_identity_are_refused() -> None:
    """Triplets would silently have no positive."""
    wanted = ["data.global_batch=64", "data.images_per_identity=4", "losses.triplet.weight=1"]
    loaded(MINIMAL, *wanted, "optimizer.accumulation=2").check(world_size=4)
    with pytest.raises(ConfigError, match="images_per_identity = 4: must divide the 2 images"):
        loaded(MINIMAL, *wanted, "optimizer.accumulation=4").check(world_size=8)
    loaded(MINIMAL, *wanted[:2], "optimizer.accumulation=4").check(world_size=8)
