"""What goes through process groups."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Records every operation of any process group: what it is, and the bytes of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            sizes = [tensor.nbytes for tensor in tensors]
            self.seen.append((function.name().removeprefix("c10d::"), (sizes and sizes[-1]) or 0))
        return function(*args, **(kwargs or {}))
