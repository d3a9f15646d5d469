"""How an optimizer whose centers have no gradient hears of ``GradScaler.unscale_``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.head.tiles.parts import Kept

_UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_


class LossScale:
    """What the gradients were multiplied by since the last step.

    ``GradScaler.unscale_`` multiplies whatever is in ``grad`` of an optimizer's parameters by one
    over the loss scale. The gradients of the centers are still micro-batches then, so they are
    multiplied later: the optimizer has a parameter beside the centers, which is one zero, and its
    zero gradient notes the factor. Norms, clipping and every other operation see a zero.

    Args:
        device: Of the optimizer.
    """

    def __init__(self, device: torch.device) -> None:
        self.parameter = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)
        zero = torch.zeros(1, device=device)
        self._gradient: _Listener = torch.Tensor._make_subclass(_Listener, zero)
        self.reset()

    @property
    def factor(self) -> Tensor | None:
        """fp32 scalar; ``None`` for 1."""
        return self._gradient.factor

    def unscaled(self, kept: list[Kept], grad_scale: Tensor | None) -> list[Kept]:
        """Return the micro-batches of the loss as it was before GradScaler multiplied it.

        Args:
            kept: The micro-batches.
            grad_scale: fp32 scalar that nobody has divided by; ``None`` for 1.
        """
        factor = self.factor
        if grad_scale is not None:
            factor = 1 / grad_scale if factor is None else factor / grad_scale
        return kept if factor is None else [one.times(factor) for one in kept]

    def reset(self) -> None:
        """Forget the factor."""
        self._gradient.factor = None
        self.listen()

    def listen(self) -> None:
        """Have the zero gradient in its place, whoever took it away."""
        self.parameter.grad = self._gradient


class _Listener(Tensor):
    """A zero that notes by what GradScaler multiplies it."""

    factor: Tensor | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation as on any tensor."""
        if func is _UNSCALE:
            gradients, _, factor = args
            for one in gradients:
                if isinstance(one, cls):
                    one.factor = factor if one.factor is None else one.factor * factor
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
