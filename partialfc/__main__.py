"""``partialfc COMMAND ...``, also as ``python -m partialfc`` and ``torchrun -m partialfc``."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train a model; under torchrun, on many GPUs",
    "slurm": "submit training to Slurm, and look after it",
    "status": "serve a page on how a run is doing",
    "preflight": "look at the machines of a run before it starts",
    "pack": "make a pack of images",
    "show": "say what is in a pack",
    "validate": "check every image of a pack",
    "convert": "change, merge and cut packs and sets of pairs",
    "split": "split a folder by identity",
    "clean": "list the images that a run doubts",
    "augment": "draw what augmentation does to images",
    "estimate": "say what a run needs: memory, time, GPUs",
    "explain": "draw a margin and say what it asks for",
    "evaluate": "measure a model on verification and identification sets",
    "report": "make the page of one run or of several",
    "embed": "turn images into embeddings",
    "search": "find faces in files of embeddings",
    "export": "write a model as ONNX, TorchScript or safetensors",
    "identities": "carry class centers over to other identities",
    "convert-checkpoint": "read and write checkpoints of arcface_torch",
}
"""Every command and what it does, in the order in which a project needs them."""

_HOME = {"slurm": "partialfc.slurm.command", "status": "partialfc.status.command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        module = import_module(_HOME.get(name, f"partialfc.commands.{name.replace('-', '_')}"))
        return int(module.main(words))
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {does}" for command, does in COMMANDS.items()]
    print("\n".join(["usage: partialfc COMMAND ...", "", *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
