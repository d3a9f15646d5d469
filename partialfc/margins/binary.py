"""Every pair of an image and a class center as a question of its own, with one threshold for all.

Shape suffixes: B = rows of the gathered batch, K = positives of a row.
"""

import math

from torch import Tensor

from partialfc.definitions import margins as definitions
from partialfc.margins.base import Margin, RowMeans, Rows, State

_LARGEST_MOVE = 1.0
"""Most that the threshold moves in a forward pass, in logits: the negatives of a run's first steps
may push with the weight of all classes."""


class UniFace(definitions.UniFace, Margin):
    """log(1 + exp(b - s (cos(theta) - m))) + the sum over negatives of log(1 + exp(s cos - b)).

    Zhou et al., "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition" (ICCV 2023). The
    threshold b is learned, so that b / s is a cosine that parts positives from negatives of all
    identities. The negatives are the sampled ones. b starts at log(10 C), where a center at 90
    degrees has a probability of 1 / (10 C).
    """

    def new_state(self, num_identities: int) -> dict[str, float]:
        """See :meth:`Margin.new_state`."""
        return {"bias": math.log(10 * num_identities)}

    def offset(self, state: State) -> Tensor | None:
        """See :meth:`Margin.offset`."""
        return state["bias"]

    def learn(
        self, state: State, sum_B: Tensor, logit_KB: Tensor, means: RowMeans
    ) -> dict[str, Tensor]:
        """See :meth:`Margin.learn`."""
        short_B = means.of_positives((state["bias"] - logit_KB).sigmoid())
        slope = means.of_rows(short_B - sum_B)
        move = (self.bias_rate * slope).clamp(-_LARGEST_MOVE, _LARGEST_MOVE)
        return {"bias": state["bias"] - move}

    def logit(self, state: State, rows: Rows) -> Tensor:
        """See :meth:`Margin.logit`."""
        return self.scale * (rows.dot_B - self.additive)
