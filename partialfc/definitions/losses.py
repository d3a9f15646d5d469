"""What a loss on embeddings takes; its module in :mod:`partialfc.losses` computes it."""

from typing import Annotated, Literal

from partialfc.definitions import Definition, Range, Unit


class Triplet(Definition):
    """max(0, d(a, p)² - d(a, n)² + margin) over triplets (https://arxiv.org/abs/1503.03832)."""

    margin: Annotated[float, Range(gt=0, lt=4), Unit("units of squared distance")] = 0.2
    """How much nearer the positive must be than the negative."""

    mining: Literal["semi_hard", "batch_hard"] = "semi_hard"
    """``semi_hard`` takes every positive with the nearest negative beyond it, ``batch_hard`` every
    image with its farthest positive and its nearest negative."""


class Contrastive(Definition):
    """d²/2 of pairs of one identity, max(0, margin - d)²/2 of two (Hadsell et al., 2006)."""

    margin: Annotated[float, Range(gt=0, le=2), Unit("units of distance")] = 1.0
    """Distance beyond which two identities leave each other alone."""


class Uniformity(Definition):
    """log mean exp(-sharpness d²) over pairs of two identities (https://arxiv.org/abs/2005.10242)."""

    sharpness: Annotated[float, Range(gt=0, le=20)] = 2.0
    """Large values see near pairs only."""


class Distillation(Definition):
    """How the embeddings follow a teacher's of the same images."""

    form: Literal["cosine", "relational", "margin"] = "cosine"
    """``cosine`` wants each embedding in the teacher's direction, ``relational`` its distances
    between images, ``margin`` triplets with a margin that is wide where the teacher is sure."""

    smallest_margin: Annotated[float, Range(ge=0, lt=4), Unit("units of squared distance")] = 0.2
    """Margin where the teacher does not tell two identities apart; of ``margin``."""

    largest_margin: Annotated[float, Range(ge=0, lt=4), Unit("units of squared distance")] = 0.5
    """Margin where the teacher's embeddings of one identity are equal and those of two have nothing
    in common; of ``margin``."""

    def conflict(self) -> str | None:
        """Return which margin is not used, or that they are the wrong way round."""
        for name in ("smallest_margin", "largest_margin"):
            value = getattr(self, name)
            if self.form != "margin" and value != getattr(type(self), name):
                return (
                    f'{name} = {value}: has no effect with form = "{self.form}". Set form = '
                    f'"margin", or remove {name}.'
                )
        if self.smallest_margin > self.largest_margin:
            return (
                f"smallest_margin = {self.smallest_margin}: must be <= largest_margin = "
                f"{self.largest_margin}. Swap them."
            )
        return None


LOSSES: dict[str, type[Definition]] = {
    "triplet": Triplet,
    "contrastive": Contrastive,
    "uniformity": Uniformity,
}
"""Every loss that needs a batch alone, by its name in a settings file."""
