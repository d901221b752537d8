"""Models on the Hugging Face Hub; needs the ``hub`` extra.

``gatedconv.HubModel(small).push_to_hub("user/resnet50-half")``, and somewhere else
``gatedconv.HubModel.from_pretrained("user/resnet50-half").model``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatedconv.deploy.export import About, export
from gatedconv.deploy.serialize import load, save

try:
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError("gatedconv.deploy.hub needs huggingface_hub: pip install 'gatedconv[hub]'") from error

FILE_NAME = "model.safetensors"
PLAN_NAME = "model.plan"
_CARD = "---\n{{ card_data }}\n---\n\n{{ text }}"

# Key of a run's summary, name in the table, factor, format.
_ROWS = (
    ("top1", "top-1 (%)", 1.0, "{:.2f}"),
    ("macs", "MACs (M)", 1e-6, "{:.2f}"),
    ("params", "parameters (k)", 1e-3, "{:.1f}"),
)
_TIMES = (("latency_ms", "latency, batch {} (ms)"), ("engine_latency_ms", "latency, batch {}, engine (ms)"))

_LOAD = """## How to run it

With [gatedconv](https://pypi.org/project/gatedconv) and PyTorch:

```python
import gatedconv

model = gatedconv.HubModel.from_pretrained("{name}").model
```
"""
_PLAN = """
Without PyTorch, with NumPy and gatedconv-runtime alone:

```python
import gatedconv_runtime as rt
from huggingface_hub import hf_hub_download

net = rt.load(hf_hub_download("{name}", "model.plan"))
y = net(x)  # x: float32 (N, C, H, W)
```
"""


class HubModel(
    nn.Module,
    ModelHubMixin,  # type: ignore[misc]
    library_name="gatedconv",
    tags=["gatedconv", "efficient-deep-learning"],
):
    """Any model that ``gatedconv.save`` writes, with ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    The repository holds the one file of ``gatedconv.save``, a card and a few words of JSON: no code and no pickle; and
    the plan for gatedconv-runtime, where ``describe`` was given an example.

    Attributes:
        model: the network itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._about = About()
        self._license: str | None = None
        self._summary: Mapping[str, Any] = {}
        self._example: Tensor | None = None

    def describe(
        self,
        *,
        summary: Mapping[str, Any] | None = None,
        license: str | None = None,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        example_input: Tensor | None = None,
    ) -> HubModel:
        """Set the contents of the model card; returns the model.

        Args:
            summary: measured figures, as in a run's ``summary.json``.
            license: as the Hub names it, for example "apache-2.0".
            classes: the names of the outputs.
            mean: see `gatedconv.export`.
            std: see `gatedconv.export`.
            example_input: (N, C, H, W); with it the repository also holds a plan, which runs without PyTorch.
        """
        self._about, self._license = About(classes, mean, std), license
        self._summary, self._example = summary or {}, example_input
        return self

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the card: what was measured, images and classes, how to run the network."""
        data = copy.copy(self._hub_mixin_info.model_card_data)
        data.license = self._license
        size = None if self._example is None else tuple(self._example.shape[1:])
        text = _card_text(kwargs.get("repo_id") or "you/name", self._about, self._summary, size)
        return ModelCard.from_template(card_data=data, template_str=_CARD, text=text)

    def forward(self, x: Tensor) -> Any:
        """Run the model: x (N, C, H, W) -> whatever it returns."""
        return self.model(x)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.model, Path(save_directory) / FILE_NAME)
        if self._example is not None:
            about = self._about
            export(
                self.model,
                Path(save_directory) / PLAN_NAME,
                self._example,
                "plan",
                classes=about.classes,
                mean=about.mean,
                std=about.std,
            )
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


def _card_text(name: str, about: About, summary: Mapping[str, Any], size: tuple[int, ...] | None) -> str:
    """A card in Markdown: what the network is, what was measured, how to run it.

    Args:
        name: of the repository.
        about: classes and normalization.
        summary: of a run, as in its ``summary.json``: figures of "dense" and "frozen".
        size: (C, H, W) of the images where the repository holds a plan, None where it holds none.
    """
    parts = [f"# {name.split('/')[-1]}\n", "A network whose gates agreed on what to keep, frozen and compacted.\n"]
    if table := _table(summary):
        parts.append(f"## Measured\n\n{table}\n")
    if about.mean is not None or about.classes is not None or size is not None:
        parts.append("## Images\n\n" + _images(about, size))
    parts.append(_LOAD.format(name=name) + (_PLAN.format(name=name) if size is not None else ""))
    return "\n".join(parts)


def _table(summary: Mapping[str, Any]) -> str:
    nets = {kind: summary[kind] for kind in ("dense", "frozen") if isinstance(summary.get(kind), Mapping)}
    rows = []
    for key, title, scale, form in _ROWS:
        if any(key in net for net in nets.values()):
            rows.append([title, *(form.format(scale * net[key]) if key in net else "-" for net in nets.values())])
    for key, title in _TIMES:
        times = [net.get(key) or {} for net in nets.values()]
        for batch in dict.fromkeys(batch for found in times for batch in found):
            rows.append([title.format(batch), *(f"{t[batch]:.3f}" if batch in t else "-" for t in times)])
    if not rows:
        return ""
    lines = [["", *("compact" if kind == "frozen" else kind for kind in nets)], ["---", *["---:"] * len(nets)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    agreement = summary.get("agreement")
    return table + (f"\n\nThe gates agree with {agreement:.2%} of the images' decisions." if agreement else "")


def _images(about: About, size: tuple[int, ...] | None) -> str:
    lines = []
    if size is not None:
        lines.append(f"- Size: {' x '.join(map(str, size))} (channels, height, width).")
    if about.mean is not None and about.std is not None:
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (about.mean, about.std))
        lines.append(f"- Pixels from 0 to 1, minus the mean ({mean}), divided by the deviation ({std}).")
    if about.classes is not None:
        names = ", ".join(about.classes[:20]) + (" and so on" if len(about.classes) > 20 else "")
        lines.append(f"- {len(about.classes)} classes: {names}.")
    return "\n".join(lines) + "\n"
