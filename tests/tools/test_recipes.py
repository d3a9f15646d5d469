"""The recipes: what is in the repository, whether it loads, checks and estimates, and its rates."""

import json

import pytest

from partialfc.backbones import BACKBONES
from partialfc.commands import estimate
from partialfc.config import load
from tests.support.places import ROOT
from tools import recipes
from tools._recipes.stages import RECIPES, staged
from tools.recipes import DATA, EVERY, GPUS, NETWORKS

FOLDER = ROOT / "configs" / "recipes"
README = (ROOT / "configs" / "README.md").read_text()


def written(data, network):
    """The predicted cells of a recipe in the table."""
    (line,) = (line for line in README.splitlines() if f"(recipes/{data}_{network}.toml)" in line)
    return " | ".join(line.split(" | ")[4:7])


def test_the_files_and_their_table_are_what_the_tool_writes():
    """Somebody who edits one by hand, or the tool without running it, is told."""
    assert {path.stem for path in FOLDER.iterdir()} == {f"{d}_{n}" for d, n in EVERY} | {*RECIPES}
    for name in RECIPES:
        assert (FOLDER / f"{name}.toml").read_text() == staged(name), f"run {recipes.__doc__}"
    for data, network in EVERY:
        path = FOLDER / f"{data}_{network}.toml"
        assert path.read_text() == recipes.recipe(data, network), f"run {recipes.__doc__}"
    assert recipes.with_table(README, written) == README


@pytest.mark.parametrize(("data", "network"), EVERY)
def test_a_recipe_loads_and_its_commands_fit_every_number_of_gpus(data, network):
    path = FOLDER / f"{data}_{network}.toml"
    commands = [line for line in path.read_text().splitlines() if "torchrun" in line]
    assert len(commands) == len(GPUS)
    for gpus, command in zip(GPUS, commands, strict=True):
        words = command.split("launch/train.py ")[1].split()
        assert words[0] == f"configs/recipes/{data}_{network}.toml"
        config = load(ROOT / words[0], words[1:])
        config.check(gpus)
        per_gpu = config.data.global_batch // (gpus * config.optimizer.accumulation)
        assert per_gpu <= NETWORKS[network].most
        assert config.backbone.name in BACKBONES
        whole_steps = DATA[data].images // config.data.global_batch * config.run.epochs
        assert config.schedule.warmup_steps <= 0.1 * whole_steps


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_in_stages_loads_and_checks_on_every_number_of_gpus(name):
    path = FOLDER / f"{name}.toml"
    commands = [line for line in path.read_text().splitlines() if "torchrun" in line]
    assert len(commands) == len(RECIPES[name][1])
    for gpus, command in zip(RECIPES[name][1], commands, strict=True):
        words = command.split("launch/train.py ")[1].split()
        config = load(ROOT / words[0], words[1:])
        config.check(gpus)
        assert len(config.in_stages()) == len(config.stages) > 1
    rates = [(one.optimizer.lr, one.schedule.final_factor) for one in config.in_stages()]
    batches = [one.data.global_batch for one in config.in_stages()]
    if name == "wf42m_lvface":  # one line, in proportion to the batch
        for (rate, factor), batch, (then, _), later in zip(
            rates, batches, rates[1:], batches[1:], strict=False
        ):
            assert then / later == pytest.approx(rate * factor / batch, rel=1e-4)


@pytest.mark.parametrize(
    ("data", "network", "batch", "rate"),
    [("ms1mv3", "r50", 1024, 0.1), ("wf42m", "r100", 4096, 0.4), ("wf42m", "vit_b", 24576, 1e-3),
     ("wf4m", "vit_t", 4096, 1e-3 / 6)],
)  # fmt: skip
def test_the_learning_rate_is_in_proportion_to_the_batch(data, network, batch, rate):
    config = load(FOLDER / f"{data}_{network}.toml")
    assert config.data.global_batch == batch
    assert config.optimizer.lr == pytest.approx(rate, rel=1e-4)
    assert config.head.optimizer.lr_factor == 1


def number(cell):
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize("network", dict.fromkeys(network for _, network in EVERY))
def test_the_recipes_of_a_network_estimate_as_the_table_says_and_fit_all_numbers_of_gpus(network):
    """On H100s, eight in the table; another torch may count a few bytes more or less.

    A process counts a network once for all its data sets.
    """
    for data in (data for data, one in EVERY if one == network):
        cells = recipes.predict(FOLDER, data, network).cells(), written(data, network)
        for now, then in zip(*(cell.split(" | ") for cell in cells), strict=True):
            last_digit = 0.1 if "." in then else 1
            assert number(now) == pytest.approx(number(then), rel=0.03, abs=1.01 * last_digit), data
        for gpus in GPUS:
            assert recipes.predict(FOLDER, data, network, gpus).fits, (data, gpus)


@pytest.mark.slow
def test_a_divided_network_takes_as_much_less_as_the_page_says(tmp_path):
    """Where it took as much as a replica, nobody would divide it."""
    recipe = str(FOLDER / "wf42m_vit_h_fsdp2.toml")
    where = ["--gpus-per-node", "8", "--gpu", "h100", "--identities", "2059906"]
    taken = []
    for shard in ("fsdp2", "none"):
        words = [f"backbone.shard={shard}", "optimizer.accumulation=8"]
        estimate.main([recipe, *words, *where, "--json", str(tmp_path / "a.json")])
        taken.append(json.loads((tmp_path / "a.json").read_text())["bytes"] / 2**30)
    assert taken == pytest.approx([24, 33], abs=1)
    assert "24 GiB of\neach of eight, by the estimate, where a replica on each takes 33" in README


def test_a_prediction_is_what_the_estimator_prints(tmp_path):
    """The table counts a network once for all data sets; the tool counts this recipe's."""
    found = recipes.predict(FOLDER, "wf42m", "mbf", 16)
    words = [str(FOLDER / "wf42m_mbf.toml"), "--json", str(tmp_path / "a.json"), "--gpu", "h100"]
    where = ["--nodes", "2", "--gpus-per-node", "8", "--identities", "2059906"]
    assert estimate.main([*words, *where]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert found.bytes == record["bytes"]
    assert found.step_seconds == pytest.approx(sum(part["seconds"] for part in record["seconds"]))
    assert found.hours * 3600 == pytest.approx(
        20 * (42_474_557 // 4096) * 4096 / record["images_per_second"]
    )
