"""A backbone with the methods that users of the Hugging Face hub know; needs the extra.

    from partialfc.checkpoint.huggingface import PretrainedBackbone

    model = PretrainedBackbone.from_pretrained("exported")  # a folder; or the name of a repository
    embeddings = model(images)  # [b, D] of RGB images [b, 3, S, S] in [-1, 1]

Nothing is looked up in the network where a folder is given.
"""

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from partialfc.checkpoint import hub_folder, recognition
from partialfc.errors import ForeignError

_REMEDY = "Give a folder that partialfc export --huggingface wrote."


class PretrainedBackbone(  # type: ignore[call-arg]  # mypy does not follow huggingface_hub
    nn.Module,
    PyTorchModelHubMixin,  # type: ignore[misc]
    library_name=hub_folder.LIBRARY,
    pipeline_tag=hub_folder.TASK,
    tags=[*hub_folder.TAGS],
):
    """Images [b, 3, S, S], RGB in [-1, 1], to embeddings [b, D], not normalised.

    ``from_pretrained`` and ``save_pretrained`` are those of ``PyTorchModelHubMixin``; what is read
    is checked first, tensors are taken all or none, and the module is in evaluation mode.

    Args:
        config: Of a config.json: ``backbone``, ``embedding_dim`` and ``image_size``.

    Attributes:
        known: Which backbone it is.
        backbone: The network.

    Raises:
        ForeignError: If the config is not sound.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.known = hub_folder.known_of(config, Path(hub_folder.CONFIG))
        self.backbone = recognition.build(self.known)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], RGB in [-1, 1]."""
        embeddings: Tensor = self.backbone(pixel_values)
        return embeddings

    def _save_pretrained(self, save_directory: Path) -> None:
        hub_folder.write_hub_folder(save_directory, self.known, self.backbone.state_dict(), {})

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | None = None,
        map_location: str | torch.device = "cpu",
        **of_the_hub: Any,
    ) -> Self:
        if config is None:
            raise ForeignError(f"{model_id}: it has no {hub_folder.CONFIG}. {_REMEDY}")
        path = Path(model_id) / hub_folder.WEIGHTS
        if not path.parent.is_dir():
            path = Path(hf_hub_download(model_id, hub_folder.WEIGHTS, **of_the_hub))
        # The file is looked at before as much memory is taken as the config asks for.
        state = hub_folder.read_weights(path, hub_folder.known_of(config, path.parent))
        model = cls(config)
        model.backbone.load_state_dict(state)
        return model.eval().to(map_location)
