"""The engine's part in files: an `Engine` is saved, loaded and written as a plan by functions that it registers.

The engine is a layer above this one, which therefore cannot import it; importing gatedconv imports both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gatedconv.deploy.export import About


class EngineHooks(NamedTuple):
    """The engine's class and functions.

    Attributes:
        kind: the class.
        unpack: engine -> its model, the size of its example, and the dtype of its products.
        pack: model, size of its example, dtype of its products -> an engine.
        write_plan: writes the plan of a model, for an example input, to a path.
    """

    kind: type[nn.Module]
    unpack: Callable[[Any], tuple[nn.Module, list[int], torch.dtype]]
    pack: Callable[[nn.Module, list[int], torch.dtype], nn.Module]
    write_plan: Callable[[nn.Module, Path, Tensor, About], None]


_hooks: EngineHooks | None = None


def register_engine(hooks: EngineHooks) -> None:
    """Let ``save``, ``load`` and ``export`` use the engine."""
    global _hooks
    _hooks = hooks


def engine_hooks() -> EngineHooks:
    """The registered hooks."""
    assert _hooks is not None, "gatedconv.engine has not been imported"
    return _hooks
