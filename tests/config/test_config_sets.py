"""Settings of several sets of images: what loads, what is written back, what is refused."""

from pathlib import Path

import pytest

from partialfc.config import Config, ConfigError, help_text, load, to_toml

TWO = """
[data]
global_batch = 512
[data.sets.second]
train = "b.rec"
share = 0.7
[data.sets.first]
train = ["a.rec", "c.rec"]
share = 0.3
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def loaded(text: str, *overrides: str) -> Config:
    Path("run.toml").write_text(text, encoding="utf-8")
    return load("run.toml", overrides)


def test_sets_are_in_the_order_of_the_file_and_come_back() -> None:
    """Their identities follow one another in it; a resumed run reads what was written."""
    config = loaded(TWO)
    assert [*config.data.by_set] == ["second", "first"]
    assert [path.name for path in config.data.sources] == ["b.rec", "a.rec", "c.rec"]
    again = loaded(to_toml(config))
    assert again == config
    assert [*again.data.by_set] == ["second", "first"]
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("overrides", "images"),
    [
        ([], (358, 154)),
        (["data.global_batch=10"], (7, 3)),
        (["data.images_per_identity=4"], (360, 152)),
        (["data.sets.second.share=0.5", "data.sets.first.share=0.5"], (256, 256)),
        (
            ["data.sets.third={train='d.rec', share=0.1}", "data.sets.first.share=0.2"],
            (359, 102, 51),
        ),
    ],
)
def test_shares_are_whole_images_that_make_a_batch(overrides, images) -> None:
    assert loaded(TWO, *overrides).data.images_of_sets == images


def test_images_are_counted() -> None:
    counted = TWO.replace("share = 0.7", "images = 500").replace("share = 0.3", "images = 12")
    assert loaded(counted).data.images_of_sets == (500, 12)
    with pytest.raises(ConfigError, match=r"500 \+ 12 = 512, must be data.global_batch = 1024"):
        loaded(counted, "data.global_batch=1024")
    with pytest.raises(ConfigError, match=r"images = 500: must be a multiple of .* = 8\. .* 504"):
        loaded(counted, "data.images_per_identity=8")


def test_data_train_is_one_set_as_before() -> None:
    """A resolved settings file of such a run is what it was."""
    config = loaded('[data]\ntrain = "a.rec"\n')
    assert config.data.images_of_sets == (1024,)
    assert not config.data.by_set
    assert "sets" not in to_toml(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=x.rec"], r"data\.train = .* with data\.sets: each set has its own"),
        (["data.sets.first.share=0.2"], r"0\.7 \+ 0\.2 = 0\.9, must be 1 together"),
        (["data.sets.first.share="], r"data\.sets\.first\.images and share: .* neither"),
        (["data.sets.first.images=3"], r"data\.sets\.first\.images and share: .* both"),
        (
            ["data.sets.first.share=", "data.sets.first.images=3"],
            r"data\.sets\.first\.images with a share of another set",
        ),
        (["data.global_batch=1"], r"sets\.first\.share = 0\.3: is less than one image"),
        (["data.sets.second.map=m"], r"sets\.second\.map = .* no set is above this one"),
        (["data.sets.a-b.train=x"], r"\[data\.sets\.a-b\]: it must be a word"),
        (["data.sets.model_dump.train=x"], r"\[data\.sets\.model_dump\]: it must be a word"),
        (["data.sets.third.share=0.1"], r"data\.sets\.third\.train: required"),
        (["data.sets.first.shar=0.1"], r"Did you mean data\.sets\.first\.share"),
        (
            ["data.sets.first.same_people=unknown", "losses.triplet.weight=1"],
            r"data\.sets\.first\.same_people = \"unknown\" with losses\.triplet",
        ),
        (
            ["data.sets.first.same_people=unknown", "head.margin.label_smoothing=0.1"],
            r"same_people = \"unknown\" with head\.margin\.label_smoothing",
        ),
        (
            ["data.sets={a={train='a.rec', share=1.0, same_people='unknown'}}"],
            r"data\.sets\.a\.same_people = \"unknown\": there is no other set",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, words) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(TWO, *overrides)


def test_help_has_the_settings_of_a_set() -> None:
    text = help_text()
    assert "[data.sets.NAME]" in text
    assert "data.sets.NAME.same_people" in text
    assert "data.train (required)" in text
