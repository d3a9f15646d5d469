"""Settings of the network from image to embedding."""

from typing import Annotated, Literal

from pydantic import Field

from partialfc.config.lora import Lora
from partialfc.config.schema import OneOrMore, Section, UserPath
from partialfc.definitions import Range
from partialfc.definitions.backbones import Backbone as BackboneName


class Options(Section):
    """What this backbone takes besides, and others do not."""


class Backbone(Section):
    """The network from image to embedding."""

    name: BackboneName = "iresnet50"
    """Which backbone; any of timm as "timm/vit_base_patch16_224.augreg_in21k", one of your own as
    "my.module:Name"."""

    embedding_dim: Annotated[int, Range(ge=1, le=4096)] = 512
    """Length of an embedding and of a class center."""

    pretrained: UserPath | None = None
    """Weights that a network of timm begins with: a file of safetensors, or a folder of timm's from
    the Hugging Face Hub. Nothing is downloaded. It counts in a new run only."""

    channels_last: bool = True
    """Keep images in NHWC memory, which tensor cores prefer. Changes rounding only."""

    compile: bool = False
    """Compile the backbone with torch.compile: a slow first step, faster ones after it."""

    checkpoint_activations: bool = False
    """Recompute activations in backward: less memory, about a third more computation."""

    ema: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, such as 0.999: verification, export and all other
    use then take the average, and checkpoints keep both. Early steps use a smaller one,
    (1 + step) / (10 + step) at most. 0 is none."""

    shard: Literal["none", "fsdp2"] = "none"
    """What each rank holds of the backbone. none: all of it, as DistributedDataParallel. fsdp2: its
    part of weights, gradients and optimizer states, and a block is gathered while it computes; the
    same numbers in less memory. Checkpoints are the same, so a run may change it."""

    reshard: bool = True
    """With fsdp2: free a block's weights after forward and gather them again for backward. false
    saves a gather and holds all weights until then."""

    offload: bool = False
    """With fsdp2 on GPUs: hold a rank's part in host memory and update it there. Saves GPU memory,
    slow."""

    sync_batch_norm: bool = False
    """Take BatchNorm statistics over the images of all ranks. Without it they depend on the batch
    per rank, and so on the number of ranks."""

    freeze: Annotated[tuple[str, ...], OneOrMore] = Field(default=(), strict=False)
    """Parts that are not trained, by the names of modules or parameters as a checkpoint has them:
    ``["conv1", "layer1"]``. The statistics of their BatchNorm stay as they are too."""

    options: Options = Field(default_factory=Options)

    lora: Lora = Field(default_factory=Lora)
