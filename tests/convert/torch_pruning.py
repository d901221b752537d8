"""What Torch-Pruning's dependency graph makes of the same networks: a peer for docs/models.md.

python -m tests.convert.torch_pruning --random 32        kept in results/architectures/torch_pruning.jsonl

Half of every layer's channels by magnitude, the outputs left alone, as its documentation shows. A network counts
as pruned if it runs afterwards with fewer MACs. Needs ``pip install torch-pruning``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import torch
from torch import nn

import gatedconv
from tests.convert.architectures import KEPT, tensors
from tests.convert.zoo import NAMED, build, drawn


def prune(name: str) -> dict[str, Any]:
    """Name, share of MACs removed, seconds, and why it failed where it did."""
    import torch_pruning

    model, images = build(name)
    row: dict[str, Any] = {"name": name, "removed": None, "seconds": 0.0, "failure": ""}
    total = gatedconv.count_macs(model, images[:1])
    classes = tensors(model(images))[0].shape[-1]
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    started = time.process_time()
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            images,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=outputs,
        )
        pruner.step()
        with torch.no_grad():
            model(images)
        row["removed"] = 1 - gatedconv.count_macs(model, images[:1]) / total
        if row["removed"] <= 0:
            row["failure"] = "nothing was removed"
    except Exception as error:  # a network that fails is a row
        row["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    row["seconds"] = time.process_time() - started
    return row


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = KEPT / "torch_pruning.jsonl"
    known = {json.loads(text)["name"] for text in path.read_text().splitlines()} if path.exists() else set()
    for name in [*NAMED, *(drawn(arguments.random, arguments.seed) if arguments.random else ())]:
        if name in known:
            continue
        row = prune(name)
        print(row, flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
