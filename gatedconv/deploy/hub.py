"""Models on the Hugging Face Hub; needs the ``hub`` extra.

``gatedconv.HubModel(small).push_to_hub("user/resnet50-half")``, and somewhere else
``gatedconv.HubModel.from_pretrained("user/resnet50-half").model``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatedconv.deploy.serialize import load, save

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError("gatedconv.deploy.hub needs huggingface_hub: pip install 'gatedconv[hub]'") from error

FILE_NAME = "model.safetensors"


class HubModel(
    nn.Module,
    ModelHubMixin,  # type: ignore[misc]
    library_name="gatedconv",
    tags=["gatedconv", "efficient-deep-learning"],
):
    """Any model that ``gatedconv.save`` writes, with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    The repository holds the one file of ``gatedconv.save``, a card and a few words of JSON: no code and no pickle.

    Attributes:
        model: the network itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        """X (N, C, H, W) -> whatever the model returns."""
        return self.model(x)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.model, Path(save_directory) / FILE_NAME)
        # What the Hub counts downloads by, and what the mixin looks for first.
        config = json.dumps({"library": "gatedconv", "file": FILE_NAME}) + "\n"
        (Path(save_directory) / "config.json").write_text(config)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **ignored: Any,
    ) -> HubModel:
        folder = Path(model_id)
        if folder.is_dir() and not (folder / FILE_NAME).is_file():
            raise FileNotFoundError(f"from_pretrained: {folder} holds no {FILE_NAME}; save_pretrained writes one")
        if folder.is_dir():
            return cls(load(folder / FILE_NAME))
        path = hf_hub_download(
            repo_id=model_id,
            filename=FILE_NAME,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls(load(path))
