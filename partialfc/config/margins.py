"""Settings of the margins: a section of each of :mod:`partialfc.definitions.margins`."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Union

from pydantic import Field

from partialfc.config.defined import Defined, section_of
from partialfc.definitions import margins as definitions


class Margin(Defined):
    """What every margin has."""

    definition: ClassVar[type[definitions.Margin]]

    name: str
    """Which margin; ``partialfc explain --list`` prints all. One of your own as
    "my.module:Name"."""


SECTIONS = {
    name: section_of(margin, Margin, name=name) for name, margin in definitions.MARGINS.items()
}
"""The section of every margin by name; the first is the default."""

if TYPE_CHECKING:
    AnyMargin = Margin
else:
    AnyMargin = Annotated[Union[*SECTIONS.values()], Field(discriminator="name")]
