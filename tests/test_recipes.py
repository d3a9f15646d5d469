"""The recipes: what is in the repository, whether it loads, checks and estimates, and its rates."""

from pathlib import Path

import pytest

from partialfc.backbones import BACKBONES
from partialfc.config import load
from tools import estimate, recipes
from tools.recipes import DATA, GPUS, NETWORKS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "recipes"
EVERY = [(data, network) for data in DATA for network in NETWORKS]


def test_the_files_and_their_table_are_what_the_tool_writes():
    """Somebody who edits one by hand, or the tool without running it, is told."""
    assert {path.stem for path in FOLDER.iterdir()} == {f"{d}_{n}" for d, n in EVERY}
    for data, network in EVERY:
        path = FOLDER / f"{data}_{network}.toml"
        assert path.read_text() == recipes.recipe(data, network), f"run {recipes.__doc__}"
    readme = (ROOT / "configs" / "README.md").read_text()
    assert recipes.with_table(readme) == readme


@pytest.mark.parametrize(("data", "network"), EVERY, ids="_".join)
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


@pytest.mark.parametrize("network", ["r18", "r100", "mbf", "vit_t"])
def test_a_recipe_estimates_and_fits_the_gpus_it_names(network, tmp_path):
    """The largest data set on 8 GPUs of 80 GiB, four of the nine networks."""
    parts = recipes.accumulation("wf42m", network, 8)
    words = [str(FOLDER / f"wf42m_{network}.toml"), f"optimizer.accumulation={parts}"]
    where = ["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100", "--identities", "2059906"]
    assert estimate.main([*words, *where]) == 0
