"""Write the recipes: a settings file for every data set and network, and their table; and those in
stages.

    python tools/recipes.py configs/recipes configs/README.md

The files are in the repository; a test makes them again and compares. The learning rate follows the
global batch and nothing else: SGD 0.1 for 1,024 images, AdamW 0.001 for 24,576, both in proportion.
A run keeps its batch on any number of GPUs, so its rate does not follow them; where a GPU cannot
hold its share, optimizer.accumulation cuts it. Memory, time of a step and hours of training in the
table are what partialfc estimate predicts for eight H100 of one node.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.progress import track

from partialfc.commands._estimate.backbone import GIB, NetworkCost, count_backbone
from partialfc.commands._estimate.cluster import Cluster
from partialfc.commands._estimate.gpus import GPUS as MODULES
from partialfc.commands._estimate.head import heads_of
from partialfc.commands._estimate.losses import count_losses
from partialfc.commands._estimate.step_time import seconds_of
from partialfc.commands.estimate import memory_of, totals
from partialfc.config import load
from partialfc.writing import write_text
from tools._recipes.stages import RECIPES, staged

GPUS = (1, 8, 16, 32, 64)
SGD_RATE, SGD_BATCH = 0.1, 1024
ADAMW_RATE, ADAMW_BATCH = 1e-3, 24_576
START, END = "<!-- recipes: written by tools/recipes.py -->", "<!-- end of recipes -->"


@dataclass(frozen=True, slots=True)
class DataSet:
    """Images and identities, where the pack usually lies, and how it is trained on."""

    title: str
    folder: str
    identities: int
    images: int
    margin: tuple[str, str, float]
    batch: int = SGD_BATCH
    sample_rate: float = 1.0
    warmup_epochs: int = 0


@dataclass(frozen=True, slots=True)
class Network:
    """A backbone; ``most`` are the images that a GPU of 80 GiB holds at once in bf16,
    with room to spare as estimated. ``masked`` is the share of patches that arcface_torch masks in
    truth: a tenth wherever its mask_ratio is not 0. A ``divided`` one is shared by FSDP2, a
    ``recomputed`` one computes its activations again, as arcface_torch's ViT-H does."""

    title: str
    backbone: str
    most: int
    masked: float = 0.0
    drop_path: float = 0.05
    divided: bool = False
    recomputed: bool = False

    @property
    def adamw(self) -> bool:
        """Whether it is a transformer, which is trained by AdamW."""
        return self.backbone.startswith("vit")


ARCFACE, COSFACE = ("arcface", "angular", 0.5), ("cosface", "additive", 0.4)
DATA = {
    "ms1mv2": DataSet("MS1MV2", "faces_emore", 85_742, 5_822_653, ARCFACE),
    "ms1mv3": DataSet("MS1MV3", "ms1m-retinaface-t1", 93_431, 5_179_510, ARCFACE),
    "glint360k": DataSet("Glint360K", "glint360k", 360_232, 17_091_657, COSFACE),
    "wf4m": DataSet("WebFace4M", "WebFace4M", 205_990, 4_235_242, COSFACE),
    "wf12m": DataSet("WebFace12M", "WebFace12M", 617_970, 12_720_066, COSFACE, sample_rate=0.2),
    "wf42m": DataSet(
        "WebFace42M",
        "WebFace42M",
        2_059_906,
        42_474_557,
        COSFACE,
        batch=4096,
        sample_rate=0.2,
        warmup_epochs=2,
    ),
}
NETWORKS = {
    "r18": Network("r18", "iresnet18", 1024),
    "r50": Network("r50", "iresnet50", 512),
    "r100": Network("r100", "iresnet100", 256),
    "r200": Network("r200", "iresnet200", 128),
    "mbf": Network("mbf", "mobilefacenet", 1024),
    "vit_t": Network("ViT-T", "vit_t", 1024),
    "vit_s": Network("ViT-S", "vit_s", 512),
    "vit_b": Network("ViT-B", "vit_b", 256, masked=0.1),
    "vit_l": Network("ViT-L", "vit_l", 128, masked=0.1),
    "vit_l_fsdp2": Network("ViT-L, FSDP2", "vit_l", 256, masked=0.1, divided=True),
    "vit_h_fsdp2": Network(
        "ViT-H, FSDP2", "vit_h", 384, drop_path=0.1, divided=True, recomputed=True
    ),
}
EVERY = [
    (data, network)
    for data in DATA
    for network, about in NETWORKS.items()
    if data == "wf42m" or not about.divided
]
"""Networks that want dividing want the largest data."""
TARGETS = {
    ("ms1mv2", "r50"): "75.13 / 95.97 / 94.07",
    ("ms1mv2", "r100"): "78.12 / 96.37 / 94.27",
    ("ms1mv3", "mbf"): "63.78 / 94.23 / 91.33",
    ("ms1mv3", "r50"): "79.14 / 96.37 / 94.47",
    ("ms1mv3", "r100"): "81.97 / 96.85 / 95.02",
    ("glint360k", "r50"): "86.34 / 97.16 / 95.81",
    ("glint360k", "r100"): "89.52 / 97.55 / 96.38",
    ("wf4m", "r100"): "89.87 / 97.19 / 95.48",
    ("wf12m", "r100"): "94.75 / 97.60 / 95.90",
    ("wf42m", "r50"): "93.83 / 97.53 / 96.16",
    ("wf42m", "r100"): "96.27 / 97.70 / 96.31",
    ("wf42m", "r200"): "97.70 / 97.97 / 96.93",
    ("wf42m", "vit_t"): "92.24 / 97.31 / 95.97",
    ("wf42m", "vit_s"): "95.87 / 97.73 / 96.57",
    ("wf42m", "vit_b"): "97.42 / 97.90 / 97.04",
    ("wf42m", "vit_l"): "97.85 / 98.00 / 97.23",
    ("wf42m", "vit_l_fsdp2"): "97.85 / 98.00 / 97.23",
}
"""Published for the arcface_torch recipe of that name: MFR-ALL, IJB-C at 1e-4, IJB-C at 1e-5."""

_PFC_03 = ("r200", *(name for name, network in NETWORKS.items() if network.adamw))
"""Published with a sample rate of 0.3 on WebFace42M, but for ViT-H, which is not published."""


def recipe(data: str, network: str) -> str:
    """Return one settings file."""
    images, net = DATA[data], NETWORKS[network]
    batch = batch_of(data, network)
    rate = 0.3 if data == "wf42m" and network in _PFC_03 else images.sample_rate
    epochs = 40 if net.adamw else 20
    warmup = (4 if net.adamw else images.warmup_epochs) * (images.images // batch)
    name, key, margin = COSFACE if net.adamw else images.margin
    target = TARGETS.get((data, network))
    published = (
        f"# Published: MFR-ALL / IJB-C 1e-4 / 1e-5 = {target}. Ours: not measured."
        if target
        else "# A starting point: nothing is published for it. Ours: not measured."
    )
    parts = [
        f"# {images.title}, {net.title}: {images.identities:,} identities, "
        f"{images.images:,} images.",
        published,
        "#",
        *_commands(data, network),
        "",
        "[run]",
        f'folder = "runs/{data}_{network}"',
        f"epochs = {epochs}",
        "",
        "[data]",
        f'train = "~/data/{images.folder}/train.rec"',
        f"global_batch = {batch}",
        "",
        "[backbone]",
        f'name = "{net.backbone}"',
        *(['shard = "fsdp2"'] if net.divided else []),
        *(["checkpoint_activations = true"] if net.recomputed else []),
        "",
        *_options(net),
        "[head]",
        f"sample_rate = {rate}",
        "",
        "[head.margin]",
        f'name = "{name}"',
        "scale = 64",
        f"{key} = {margin}",
        "",
        *_optimizers(net),
        "",
        "[optimizer]",
        *(['name = "adamw"'] if net.adamw else []),
        f"lr = {learning_rate(data, network):.6g}",
        f"weight_decay = {'0.1' if net.adamw else '5e-4'}",
        *(['decay = "matrices"'] if net.adamw else []),
        "",
        "[schedule]",
        f"warmup_steps = {warmup}",
        "",
        "[verification]",
        f'pairs = ["~/data/{images.folder}/lfw.bin", "~/data/{images.folder}/cfp_fp.bin",',
        f'         "~/data/{images.folder}/agedb_30.bin"]',
        "every_steps = 2000",
    ]
    return "\n".join(parts) + "\n"


def batch_of(data: str, network: str) -> int:
    """Return the global batch: arcface_torch's, and 4,096 for transformers where it has none."""
    if NETWORKS[network].adamw:
        return ADAMW_BATCH if data == "wf42m" else 4096
    return DATA[data].batch


def learning_rate(data: str, network: str) -> float:
    """Return the rate in proportion to the batch."""
    batch = batch_of(data, network)
    if NETWORKS[network].adamw:
        return ADAMW_RATE * batch / ADAMW_BATCH
    return SGD_RATE * batch / SGD_BATCH


def accumulation(data: str, network: str, gpus: int) -> int:
    """Return the fewest micro-batches of which a GPU holds one."""
    per_gpu = batch_of(data, network) // gpus
    parts = 1
    while per_gpu // parts > NETWORKS[network].most or per_gpu % parts:
        parts += 1
    return parts


def _options(net: Network) -> list[str]:
    if not net.adamw:
        return []
    return ["[backbone.options]", f"masked = {net.masked}", f"drop_path = {net.drop_path}", ""]


def _optimizers(net: Network) -> list[str]:
    if net.adamw:
        return ["[head.optimizer]", 'name = "adamw"', "weight_decay = 0.1"]
    return ["[head.optimizer]", "weight_decay = 5e-4"]


def _commands(data: str, network: str) -> list[str]:
    lines = []
    for gpus in GPUS:
        nodes = -(-gpus // 8)
        start = f"--nnodes={nodes} --nproc-per-node={min(gpus, 8)}"
        parts = accumulation(data, network, gpus)
        extra = f" optimizer.accumulation={parts}" if parts > 1 else ""
        word = "GPU " if gpus == 1 else "GPUs"
        lines.append(
            f"#   {gpus:2} {word}  torchrun {start} launch/train.py "
            f"configs/recipes/{data}_{network}.toml{extra}"
        )
    return lines


@dataclass(frozen=True, slots=True)
class Predicted:
    """What partialfc estimate says of a recipe: bytes of a GPU, whether they fit, and the times."""

    bytes: int
    fits: bool
    step_seconds: float
    hours: float

    def cells(self) -> str:
        """Return them as cells of the table."""
        step, hours = f"{self.step_seconds * 1e3:,.0f} ms", f"{self.hours:.1f}"
        hours = hours if self.hours < 9.95 else f"{self.hours:.0f}"
        return f"{self.bytes / GIB:.0f} GiB | {step} | {hours} h"


def predict(folder: Path, data: str, network: str, gpus: int = 8, gpu: str = "h100") -> Predicted:
    """Return the estimate of a recipe in a folder, on nodes of eight GPUs and 400 Gbit/s."""
    parts, images = accumulation(data, network, gpus), DATA[data]
    file = folder / f"{data}_{network}.toml"
    config = load(file, [f"optimizer.accumulation={parts}"])
    cluster = Cluster(MODULES[gpu], "cuda", -(-gpus // 8), min(gpus, 8), 400e9 / 8)
    counted = _counted(
        folder, network, config.data.global_batch // gpus // parts, gpus > 1, parts > 1
    )
    heads = heads_of(config, {"": images.identities}, gpus, "cuda")
    losses = count_losses(config, heads, gpus, "cuda")
    needed = max(totals(memory_of(config, counted, losses, heads, cluster)))
    step = sum(seconds for _, seconds, _ in seconds_of(config, counted, losses, heads, cluster))
    steps = images.images // config.data.global_batch * (config.run.epochs or 0)
    return Predicted(needed, needed <= cluster.gpu.memory, step, steps * step / 3600)


@cache
def _counted(folder: Path, network: str, micro_batch: int, several: bool, cut: bool) -> NetworkCost:
    """Count a network once for all data sets: nothing else of a recipe changes what is counted."""
    ranks, parts = 1 + several, 1 + cut
    words = [f"data.global_batch={micro_batch * ranks * parts}", f"optimizer.accumulation={parts}"]
    data = next(data for data, one in EVERY if one == network)
    return count_backbone(load(folder / f"{data}_{network}.toml", words), ranks)


def table(predicted: Callable[[str, str], str]) -> str:
    """Return the table of all recipes in markdown; ``predicted`` makes three cells of a recipe."""
    lines = [
        "| recipe | batch | lr | sample rate | GPU's memory, predicted | step, predicted | "
        "run, predicted | MFR-ALL / IJB-C 1e-4 / 1e-5, published | ours, measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for data, network in EVERY:
        images, net, name = DATA[data], NETWORKS[network], f"{data}_{network}"
        rate = recipe(data, network).split("sample_rate = ")[1].split("\n")[0]
        lines.append(
            f"| [{images.title} {net.title}](recipes/{name}.toml) | {batch_of(data, network):,} | "
            f"{learning_rate(data, network):.3g} | {rate} | {predicted(data, network)} | "
            f"{TARGETS.get((data, network), '–')} | |"
        )
    return "\n".join(lines)


def with_table(text: str, predicted: Callable[[str, str], str]) -> str:
    """Return the README of the settings with the table put in.

    Raises:
        ValueError: If the marks of the table are not there.
    """
    before, mark, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the marks {START} and {END} must be there.")
    return f"{before}{START}\n{table(predicted)}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the settings files go")
    parser.add_argument("readme", type=Path, help="where the table goes")
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text(encoding="utf-8")
        with_table(text, lambda data, network: "")
    except (OSError, ValueError) as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        write_text(options.folder / f"{name}.toml", staged(name))
    for data, network in EVERY:
        write_text(options.folder / f"{data}_{network}.toml", recipe(data, network))
    cells = {
        one: predict(options.folder, *one).cells()
        for one in track(EVERY, "estimating", console=Console(stderr=True))
    }
    write_text(options.readme, with_table(text, lambda *of: cells[of]))
    print(f"{len(EVERY) + len(RECIPES)} recipes in {options.folder}, the table in {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
