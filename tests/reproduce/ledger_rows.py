"""Rows for tests of the ledger and of what is derived from it."""

from __future__ import annotations

from typing import Any

from reproduce.ledger import LedgerRow


def row(experiment: str = "headline-r56-c10", seed: int = 0, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "experiment": experiment,
        "seed": seed,
        "dataset": "cifar10",
        "model": "resnet56",
        "kind": "gated",
        "top1_last": 93.5,
        "macs": 6e7,
        "macs_dense": 1.2e8,
        "epochs": 300,
        "device": "cpu",
        "commit": None,
        "versions": {"torch": "2.15"},
        "wall_s": 12.5,
        "open_ratio": 0.6,
        "pruning_rate": 0.4,
        "polar": 0.001,
        "agreement": 0.999,
        "top1_dynamic": 93.6,
        "macs_dynamic": 6.1e7,
    }
    return LedgerRow(**(values | changes))
