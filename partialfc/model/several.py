"""What images of several identities, or of none, are to a run."""

from partialfc.config import Config, ConfigError
from partialfc.head import Several
from partialfc.head.checks import refuse_several
from partialfc.losses.over_ranks import EmbeddingLosses
from partialfc.margins import Margin


def several_of(
    config: Config, most: int | None, margin: Margin, losses: EmbeddingLosses
) -> Several | None:
    """Return what the head is told of them; ``None`` where each image has one identity.

    Args:
        config: Of the run.
        most: K, the most identities of an image, as :attr:`partialfc.data.dataset.DataSet.most`.
        margin: What the logits are.
        losses: On the embeddings. A teacher is followed image by image, or pair by pair of any
            two; the others ask which two images are of one identity.

    Raises:
        ConfigError: If the margin or a loss cannot take them.
    """
    if most is None:
        return None
    several = Several(most=most, **config.head.several.model_dump())
    for name, one in losses.losses.items():
        if name != "teacher" or one.loss.compares_pairs:
            key = "teacher.form" if name == "teacher" else f"{name}.weight"
            raise ConfigError(
                f"losses.{key}: it asks which two images are of one identity, and by data.labels "
                "an image may have several, or none. Remove it, or give each image one label."
            )
    of_centers = max(config.losses.center.weight, config.losses.inter_class.weight)
    try:
        refuse_several(several, margin, of_centers)
    except ValueError as error:
        raise ConfigError(f"data.labels: an image may have several identities: {error}") from error
    return several
