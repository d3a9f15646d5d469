"""Settings in stages: what a stage may change, what it then has, and how it is written back."""

import json
from pathlib import Path

import pytest

from partialfc.commands.estimate import main as estimate
from partialfc.commands.explain import main as explain
from partialfc.config import Config, ConfigError, config_hash, help_text, load, to_toml

TEXT = """
[data]
train = "train.rec"
global_batch = 64

[head.margin]
name = "cosface"
additive = 0.3

[losses.triplet]
weight = 0.5
margin = 0.2

[schedule]
name = "polynomial"
power = 3.0
warmup_steps = 9

[[stages]]
name = "first"
epochs = 2
head.sample_rate = 0.1

[[stages]]
name = "second"
steps = 20
data.skip = "bad.jsonl"
data.image_size = 224
head.margin.name = "arcface"
losses.triplet.weight = 0
optimizer.rates = {stem = 0.5}

[stages.schedule]
name = "cosine"
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(text: str = TEXT, *overrides: str) -> Config:
    Path("run.toml").write_text(text, encoding="utf-8")
    return load("run.toml", overrides)


def test_a_stage_has_the_settings_above_with_its_own_on_top() -> None:
    first, second = loaded().in_stages()
    assert (first.run.epochs, first.run.steps) == (2.0, None)
    assert (second.run.epochs, second.run.steps) == (None, 20)
    assert (first.head.sample_rate, second.head.sample_rate) == (0.1, 1.0)
    assert (first.data.image_size, second.data.image_size) == (112, 224)
    assert first.stages == second.stages == ()


def test_a_stage_with_all_centers_has_no_negatives_that_stand_for_others() -> None:
    """They are refused where no stage has any."""
    few = ('head.negatives="nearest"', "head.nearest.neighbours=8")
    first, second = loaded(TEXT, *few).in_stages()
    assert (first.head.negatives, first.head.nearest.neighbours) == ("nearest", 8)
    assert second.head.negatives == "uniform"
    with pytest.raises(
        ConfigError, match=r'head\.negatives = "nearest" with head\.sample_rate = 1'
    ):
        loaded(TEXT.replace("head.sample_rate = 0.1", "head.sample_rate = 1"), *few)


def test_what_has_another_name_or_no_weight_is_stated_whole() -> None:
    """Nothing of a CosFace is an ArcFace's, of a polynomial a cosine's, or of a loss left out."""
    first, second = loaded().in_stages()
    assert (first.head.margin.additive, second.head.margin.angular) == (0.3, 0.5)
    assert (first.schedule.warmup_steps, second.schedule.warmup_steps) == (9, 0)
    assert (first.losses.triplet.margin, second.losses.triplet.weight) == (0.2, 0)


def test_stages_are_written_back_as_they_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is that of the folder the run was started in, wherever it goes on."""
    config = loaded()
    text = to_toml(config)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = loaded(text)
    assert again == config
    assert again.in_stages() == config.in_stages()
    assert config_hash(again) == config_hash(config)
    assert again.in_stages()[1].data.skip == (Path.cwd().parent / "bad.jsonl",)
    assert [line for line in text.splitlines() if "[[" in line] == ["[[stages]]"] * 2


def test_without_stages_nothing_says_so() -> None:
    """Files, hashes and records are what they were before there were any."""
    plain = loaded(TEXT[: TEXT.index("[[stages]]")])
    assert "stages" not in plain.model_dump()
    assert "[stages" not in to_toml(plain).replace("[[", "[")
    assert plain.in_stages() == (plain,)
    assert plain.run.epochs == 20.0
    assert "[[stages]]" in help_text()
    assert "stages.epochs" in help_text()


def test_a_stage_changes_one_of_several_heads() -> None:
    sets = "".join(f'[data.sets.{name}]\ntrain = "{name}.rec"\nshare = 0.5\n' for name in "ab")
    heads = '[heads.a]\nsample_rate = 0.1\n[heads.b.margin]\nname = "cosface"\n'
    stage = '[[stages]]\nname = "one"\nsteps = 1\n'
    (one,) = loaded(
        sets + heads + stage + "heads.a = {sample_rate = 1.0, weight = 2.0}\n"
    ).in_stages()
    assert [(head.sample_rate, head.weight) for _, head in one.heads] == [(1.0, 2.0), (1.0, 1.0)]
    for change, message in (
        ('heads.b.margin.name = "softmax"', 'heads.b.margin.name = "softmax": its class centers'),
        ('heads.a.optimizer.name = "adamw"', 'heads.a.optimizer.name = "adamw": it belongs to the'),
        ("heads.a.sets = 'b'", "heads.a.sets belongs to the whole run."),
    ):
        with pytest.raises(ConfigError) as error:
            loaded(f"{sets}{heads}{stage}{change}\n")
        assert str(error.value).startswith(f"run.toml: stages.one: {message}"), error.value


ONE = '[data]\ntrain = "train.rec"\n[[stages]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE, "stages.a.steps = None with epochs = None: one of the two sets the length"),
        (ONE + "steps = 1\nepochs = 1\n", "stages.a.steps = 1 with epochs = 1.0: one of the two"),
        (ONE + "steps = 0\n", "stages.a.steps = 0: must be an integer >= 1, in steps."),
        (ONE + "steps = 1\nbackbone.name = 'vit_b'\n", "stages.a: backbone.name belongs to the"),
        (ONE + "steps = 1\nrun.seed = 3\n", "stages.a: run.seed belongs to the whole run."),
        (ONE + "steps = 1\nhead.compute = 'fp32'\n", "stages.a: head.compute belongs to the whole"),
        (ONE + "steps = 1\nwarmup = 3\n", "stages.a: warmup belongs to the whole run. A stage may"),
        (ONE + "steps = 1\nhead.sample_rate = 2\n", "stages.a: head.sample_rate = 2: must be a"),
        (ONE + "steps = 1\ndata.size = 2\n", "stages.a: data.size = 2: unknown setting."),
        (
            ONE + "steps = 1\noptimizer.name = 'adamw'\n",
            'stages.a: optimizer.name = "adamw": it be',
        ),
        (ONE + "steps = 1\ndata.bad_share = 0.5\n", "stages.a: data.bad_share = 0.5: it belongs"),
        (ONE + "steps = 2\nschedule.warmup_steps = 2\n", "stages.a: schedule.warmup_steps = 2: mu"),
        (
            ONE + "steps = 1\nhead.margin.name = 'subcenter_arcface'\n",
            'stages.a: head.margin.name = "subcenter_arcface": its class centers have',
        ),
        (ONE + 'steps = 1\n[[stages]]\nname = "a"\nsteps = 2\n', "stages.a: two stages have this"),
        (ONE.replace('name = "a"\n', "steps = 1\n"), "stages.1.name: required, and not set."),
        (ONE + "steps = 1\n[run]\nepochs = 3\n", "run.epochs = 3 with [[stages]]: each stage has"),
        ('stages = 3\n[data]\ntrain = "train.rec"\n', "stages: write each below a line [[stages]]"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(text)
    assert str(error.value).startswith(f"run.toml: {message}"), error.value


def test_mistakes_of_all_stages_come_together_and_so_do_those_of_ranks() -> None:
    wrong = TEXT.replace("= 0.1\n\n[[", "= 7\n\n[[").replace("= 224", "= 7")
    with pytest.raises(ConfigError, match="2 problems") as error:
        loaded(wrong)
    assert "stages.first: head.sample_rate = 7" in str(error.value)
    assert "stages.second: data.image_size = 7" in str(error.value)
    config = loaded(TEXT.replace("steps = 20", "steps = 20\ndata.global_batch = 30"))
    with pytest.raises(ConfigError) as error:
        config.check(4)
    assert str(error.value).startswith("stages.second: data.global_batch = 30: must divide")


def test_explain_and_estimate_look_at_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    """The estimate's tables are those of the stage that takes most, and all must fit."""
    small = TEXT.replace("train.rec", "a.rec").replace(
        "[data]", '[backbone]\nname = "convnet_s"\n[data]'
    )
    Path("run.toml").write_text(small.replace("= 224", "= 64"))
    assert explain(["run.toml", "--identities", "1000", "--png", "m.png"]) == 0
    said = capsys.readouterr().out
    assert said.index("Stage first") < said.index("cosface") < said.index("Stage second")
    words = ["run.toml", "--gpu", "h100", "--identities", "1000", "--json", "out.json"]
    assert estimate(words) == 0
    said, record = capsys.readouterr().out, json.loads(Path("out.json").read_text())
    sizes = {name: one["bytes"] for name, one in record["stages"].items()}
    assert record["bytes"] == max(sizes.values()) == sizes["first"] > sizes["second"]
    assert said.startswith("Stage first, which takes the most memory:")
    assert "stage second: " in said
