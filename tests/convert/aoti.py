"""AOTInductor packages of compact networks that differ in kind, for docs/models.md.

python -m tests.convert.aoti        kept in results/architectures/aoti.jsonl

Gated with gate="both", masks open with a probability of 70 %, compacted, compiled for this machine's CPU, loaded again
and run on the two images that it was compiled with and on five others.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import gatedconv
from tests.convert.architectures import KEPT, random_masks, relative
from tests.convert.zoo import build, randomize

NETWORKS = ("resnet18", "mobilenet_v3_large", "convnext_tiny", "densenet121")
FILE = KEPT / "aoti.jsonl"


@torch.no_grad()
def package(name: str) -> dict[str, Any]:
    """Name, and the largest error of the package against the frozen network for both batches."""
    model, images = build(name)
    randomize(model, images)
    gated = gatedconv.gate_model(model, "both", example_input=images)
    frozen = gatedconv.freeze(gated, masks=random_masks(gatedconv.gates(gated), 0.7, seed=3))
    small = gatedconv.compact(frozen, images)
    others = torch.randn(5, *images.shape[1:], generator=torch.Generator().manual_seed(6))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        gatedconv.export(small, path, images, format="aoti")
        loaded = torch._inductor.aoti_load_package(str(path))
        errors = {str(len(x)): relative(loaded(x), frozen(x), model(x)) for x in (images, others)}
    return {"name": name, "errors": errors, "torch": torch.__version__}


def main() -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in NETWORKS:
        rows.append(package(f"torchvision/{name}"))
        print(rows[-1], flush=True)
        FILE.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
