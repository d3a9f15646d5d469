"""Say what the margin of a settings file means: its curve, its boundary, what it can reach.

    partialfc explain configs/demo.toml --identities 1000 --png margin.png
    partialfc explain configs/demo.toml --identities 1000 head.margin.name=cosface
    partialfc explain --list

With stages, that of each stage, and with --png a picture of each.

The picture has the positive's logit against its angle, and the gradient that pulls an embedding to
its own center.
"""

# Shape suffix: N = angles.

import inspect
import math
from pathlib import Path

import matplotlib as mpl

from partialfc.commands._command import command_parser

mpl.use("Agg")

import torch
from matplotlib import pyplot
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from partialfc.config import Config, ConfigError, load
from partialfc.config.heads import each_head
from partialfc.margins import MARGINS, Margin
from partialfc.margins.guidance import (
    WANTED_POSTERIOR,
    boundary,
    curve,
    largest_additive,
    posterior,
    smallest_scale,
    warnings,
)
from partialfc.model.build import margin_of
from partialfc.training.images import numberings, open_images

DEGREES = (0, 15, 30, 45, 60, 75, 90, 120, 150, 180)
NORMS = (5.0, 20.0, 60.0, 100.0)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("explain", __doc__)
    parser.add_argument("config", nargs="?", type=Path, help="a TOML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of it")
    parser.add_argument("--list", action="store_true", help="print the names of all margins")
    parser.add_argument("--identities", type=int, help="default: those of data.train")
    parser.add_argument("--head", default="", metavar="NAME", help="which of several heads")
    parser.add_argument("--png", type=Path, help="draw the curve")
    options = parser.parse_intermixed_args(arguments)
    if options.list:
        print("\n".join(MARGINS))
        return 0
    if options.config is None:
        parser.error("a settings file is needed, or --list")
    whole = load(options.config, options.overrides)
    heads = each_head(whole)
    if options.head not in heads:
        named = ", ".join(filter(None, heads))
        raise ConfigError(
            f"--head {options.head}: name one of {named}." if named else "--head: there is [head]."
        )
    identities = options.identities
    try:
        if identities is None:
            identities = numberings(whole, open_images(whole))[options.head].count
    except ConfigError as error:
        raise ConfigError(f"{error}\nWithout the pack, say --identities N.") from error
    if identities < 2:
        raise ValueError(f"--identities {identities}: a softmax needs two.")
    names = [one.name for one in whole.stages] or [""]
    for name, stage in zip(names, whole.in_stages(), strict=True):
        own = each_head(stage)[options.head]
        if name:
            print(f"Stage {name}\n")
        explain(own, margin_of(own), identities)
        if options.png:
            path = options.png.with_stem(f"{options.png.stem}_{name}") if name else options.png
            draw(own, margin_of(own), identities, path)
            print(f"{path}: written")
    return 0


def explain(config: Config, margin: Margin, identities: int) -> None:
    """Print the equation, the bounds, the boundary and the curve."""
    console = Console()
    meaning = inspect.cleandoc(type(margin).__doc__ or "").split("\n\nAttributes:")[0]
    meaning = meaning.replace("``", "")
    console.print(f"[bold]{config.head.margin.name}[/bold]: {escape(meaning)}\n", highlight=False)
    settings = Table("setting", "value", title="head.margin")
    for name, value in config.head.margin.model_dump(exclude={"name"}).items():
        settings.add_row(name, str(value))
    console.print(settings)

    classes = max(2, math.ceil(identities * config.head.sample_rate))
    dim = config.backbone.embedding_dim
    console.print(f"{identities:,} identities, {classes:,} in the softmax, {dim} dimensions:")
    if margin.unit_embeddings and margin.unit_centers:
        for wanted in (WANTED_POSTERIOR, 0.99, 0.999):
            needed = smallest_scale(classes, wanted)
            console.print(f"  a posterior of {wanted:g} needs a scale of at least {needed:.1f}")
    console.print(f"  an additive margin stays below {largest_additive(classes, dim):.3g}")
    table = Table("norm", "boundary", "largest posterior", "slope at it", title="by norm")
    for norm in norms(margin):
        angle = boundary(margin, norm, identities)
        slope = curve(margin, torch.tensor([angle]), norm, identities).slope_N
        table.add_row(
            f"{norm:g}" if len(norms(margin)) > 1 else "any",
            f"{math.degrees(angle):.1f}°",
            f"{posterior(margin, classes, norm, identities):.6f}",
            f"{float(slope):.3g}",
        )
    console.print(
        "boundary: the angle to the own center at which its logit is that of a negative at 90°; "
        "without a margin, 90°."
    )
    console.print(table)
    several = len(norms(margin)) > 1
    labels = [f"logit, norm {norm:g}" if several else "logit" for norm in norms(margin)]
    points = Table("angle", *labels)
    theta_N = torch.tensor([math.radians(degree) for degree in DEGREES])
    columns = [curve(margin, theta_N, norm, identities).logit_N.tolist() for norm in norms(margin)]
    for degree, *logits in zip(DEGREES, *columns, strict=True):
        points.add_row(f"{degree}°", *(f"{logit:.2f}" for logit in logits))
    console.print(points)
    for sentence in warnings(margin, classes, dim):
        console.print(f"[yellow]warning:[/yellow] {escape(sentence)}", highlight=False)


def norms(margin: Margin) -> tuple[float, ...]:
    """Return the norms at which a margin differs."""
    depends = margin.needs_norms or not margin.unit_embeddings
    return NORMS if depends else NORMS[:1]


def draw(config: Config, margin: Margin, identities: int, path: Path) -> None:
    """Write the picture of the curve."""
    theta_N = torch.linspace(0, math.pi, 1801)
    degree_N = [math.degrees(value) for value in theta_N.tolist()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = pyplot.get_cmap("viridis")([0.1, 0.4, 0.65, 0.9])
    for norm, colour in zip(norms(margin), colours, strict=False):
        found = curve(margin, theta_N, norm, identities)
        angle = math.degrees(boundary(margin, norm, identities))
        label = f"norm {norm:g}" if len(norms(margin)) > 1 else config.head.margin.name
        label = f"{label}, boundary {angle:.0f}°"
        left.plot(degree_N, found.logit_N, color=colour, label=label)
        left.plot(degree_N, found.scale * theta_N.cos(), color=colour, linestyle=":", linewidth=1)
        right.plot(degree_N, found.slope_N * theta_N.sin(), color=colour, label=label)
        right.plot(degree_N, found.scale * theta_N.sin(), color=colour, linestyle=":", linewidth=1)
        left.plot([angle], [0], "o", color=colour, markersize=5)
    left.axhline(0, color="#7b8794", linewidth=0.8)
    left.set(title="logit of the positive", xlabel="angle to the own center, degrees")
    right.set(
        title="pull towards the own center, −∂z/∂θ", xlabel="angle to the own center, degrees"
    )
    for axes in (left, right):
        axes.set_xticks(range(0, 181, 30))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.plot([], [], color="#7b8794", linestyle=":", label="without the margin")
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
