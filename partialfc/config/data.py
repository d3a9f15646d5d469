"""Settings of the training images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from partialfc.config.arrays import refuse_images
from partialfc.config.defined import Defined, section_of
from partialfc.config.labels import Labelled
from partialfc.config.schema import OneOrMore, SourcePath, UserPath, nearest_multiples
from partialfc.config.sets import Set, Sets, images_of_sets, refuse_conflicts
from partialfc.definitions import Range, Unit
from partialfc.definitions import augment as definitions
from partialfc.definitions.augment import CHANGES, Probability, Shift

if TYPE_CHECKING:
    Augment = Defined
else:
    Augment = section_of(definitions.Augment, Defined)


class Data(Labelled):
    """The training images and how they reach the backbone."""

    kind: Literal["images", "arrays"] = "images"
    """What is trained on. arrays: ``train`` names .npy files [N, ...] of fp16, fp32 or uint8, read
    by row as they are; ``labels`` says whom each row is of."""

    shape: Annotated[tuple[Annotated[int, Range(ge=1)], ...] | None, Field(strict=False)] = None
    """Of one sample of arrays, such as [80, 200]; the backbone receives [batch, 80, 200]."""

    train: Annotated[tuple[SourcePath, ...], OneOrMore, Field(strict=False, min_length=1)]
    """The pack to train on, a .rec file with its .idx beside it; or a folder with a folder of
    images for each identity, or a list of lines path<TAB>identity. WebDataset's tar shards serve,
    too: one, ``"shards/{0000..0012}.tar"``, a folder of them, or a URL of any, as
    ``"s3://bucket/shards"``. Of several, one after the other, the identities of each follow those
    of the ones before it."""

    skip: Annotated[tuple[UserPath, ...], OneOrMore] = Field(default=(), strict=False)
    """Lists of images to leave out, as ``partialfc validate --bad`` and training write them."""

    loader: Literal["auto", "dali", "torch"] = "auto"
    """What decodes and augments. ``auto`` is DALI where it is installed, otherwise torch; both
    make the same batches."""

    global_batch: Annotated[int, Range(ge=1), Unit("images")] = 1024
    """Images per optimizer step over all ranks. Must divide by ranks x ``optimizer.accumulation``,
    and decides the result, so keep it when the number of ranks changes."""

    uneven: bool = False
    """Train on any number of ranks: where the batch does not divide by them, some have one image
    more than others in every micro-batch. The loss is the mean over all images as before; the
    ranks with fewer images wait."""

    image_size: Annotated[int, Range(ge=32, le=1024), Unit("pixels")] = 112
    """Side of the square images that the backbone receives."""

    flip: Probability = 0.5
    """Probability that an image is mirrored. 0 never, 1 always."""

    shift: Shift = 0
    """Largest random shift of an image along each axis; its outermost pixels fill the border. 0
    turns it off."""

    augment: Augment = Field(default_factory=Augment)

    last_batch: Literal["drop", "pad"] = "drop"
    """What happens to the images left over after an epoch's last full global batch: ``drop``
    leaves them out of this epoch, ``pad`` fills the batch with the epoch's first images."""

    images_per_identity: Annotated[int | None, Range(ge=1), Unit("images")] = None
    """Make every batch of identities drawn alike, with this many images of each (P x K), for losses
    that compare images. Must divide ``data.global_batch``. An epoch is then every identity once.
    Left out, all images are shuffled."""

    block: Annotated[int | None, Range(ge=1), Unit("images")] = None
    """For slow storage: shuffle blocks of this many neighbouring images, and within a window of
    blocks the images. Left out, every image is read from anywhere."""

    block_window: Annotated[int, Range(ge=1), Unit("blocks")] = 16
    """Blocks whose images are shuffled together."""

    bad_share: Annotated[float, Range(ge=0, lt=1)] = 0.001
    """Largest share of the images that may be replaced because they cannot be decoded. Each is
    reported, and the next image of the epoch stands for it. Above 0, one always may be."""

    threads: Annotated[int, Range(ge=1), Unit("threads")] = 4
    """Decoding threads per rank."""

    prefetch: Annotated[int, Range(ge=1), Unit("batches")] = 2
    """Batches prepared ahead on each rank. More of them ride out a slow disk and cost memory."""

    sets: Sets = Field(default_factory=Sets)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of what the backbone receives, without the batch."""
        return self.shape or (3, self.image_size, self.image_size)

    @property
    def by_set(self) -> dict[str, Set]:
        """The sets by name, in the order of their identities; empty with ``train`` alone."""
        return dict(self.sets)

    @property
    def images_of_sets(self) -> tuple[int, ...]:
        """How many images of every global batch are of each set; with ``train`` all of one."""
        return images_of_sets(self)

    @property
    def labelled(self) -> tuple[Labelled, ...]:
        """The images, or the sets of them, that have labels beside them."""
        every: tuple[Labelled, ...] = (self, *self.by_set.values())
        return tuple(one for one in every if one.labels is not None)

    @property
    def sources(self) -> tuple[Path, ...]:
        """All that is trained on, in the order of its identities."""
        return self.train + tuple(path for one in self.by_set.values() for path in one.train)

    @model_validator(mode="after")
    def _identities_are_whole(self) -> "Data":
        repeated, batch = self.images_per_identity or 1, self.global_batch
        if batch % repeated:
            raise ValueError(
                f"images_per_identity = {repeated}: must divide data.global_batch = {batch}. "
                f"Nearest batches: {nearest_multiples(batch, repeated)}."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _arrays_are_not_mirrored(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "arrays":
            return {"flip": 0.0, **values}
        return values

    @model_validator(mode="after")
    def _images_or_arrays(self) -> "Data":
        refuse_images(self)
        return self

    @model_validator(mode="after")
    def _sets_go_together(self) -> "Data":
        refuse_conflicts(self)
        return self

    @model_validator(mode="after")
    def _loader_makes_the_changes(self) -> "Data":
        changes = [name for name in CHANGES if name != "crop" and getattr(self.augment, name)]
        if self.loader == "torch" and changes:
            raise ValueError(
                f'loader = "torch": it knows crop, shift and flip, not {changes[0]}. Use "dali", '
                "or set "
                f"{', '.join(f'data.augment.{name} = 0' for name in changes)}."
            )
        return self

    @model_validator(mode="after")
    def _one_arrangement(self) -> "Data":
        if self.block is not None and self.images_per_identity is not None:
            raise ValueError(
                f"block = {self.block} with data.images_per_identity = "
                f"{self.images_per_identity}: an epoch has one arrangement. Remove one of the two."
            )
        default = type(self).model_fields["block_window"].default
        if self.block is None and self.block_window != default:
            raise ValueError(
                f"block_window = {self.block_window}: there are no blocks. Set data.block, or "
                "remove block_window."
            )
        return self
