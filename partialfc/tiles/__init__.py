"""The two passes of the head over tiles of class centers; one implementation a module."""

from partialfc.tiles.torch import FirstPass, Kept, first_pass, second_pass, unit_rows

__all__ = ["FirstPass", "Kept", "first_pass", "second_pass", "unit_rows"]
