"""The graph module that carries a converted or compacted network."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, fx, nn

from gatedconv.gating import Gate, forget

# Attributes of a converted network, in addition to graph and weights, that torch.fx drops when it copies.
_CARRIED = ("mac_terms", "conversion", "consensus", "gatedconv_size", "fixed_size")


class GraphNet(fx.GraphModule):
    """A ``torch.fx.GraphModule`` that keeps gatedconv's attributes, and gates that its graph no longer calls.

    ``fixed_size``, where there is one, is the size without the batch, such as (C, H, W), of the only inputs that its
    constants are right for; a call with others raises ValueError.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphNet") -> None:
        graph._tracer_cls = None  # a pickle is traced again, by torch.fx's own tracer
        super().__init__(root, graph, class_name)
        present = {name for name, _ in self.named_modules()}
        for name, module in root.named_modules():
            if isinstance(module, Gate) and name not in present:
                self.add_submodule(name, module)
        self.register_forward_pre_hook(_before_call)

    def _deepcopy_init(self) -> Any:
        return GraphNet.__init__

    def __reduce__(self) -> Any:
        build, state = super().__reduce__()
        return _unpickled, (build, *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphNet:
        result: GraphNet = super().__deepcopy__(memo)  # type: ignore[assignment]
        for name in _CARRIED:
            if name in self.__dict__:
                setattr(result, name, copy.deepcopy(self.__dict__[name], memo))
        result.training = self.training
        return result


def _unpickled(build: Any, *state: Any) -> nn.Module:
    model: nn.Module = build(*state)
    model.register_forward_pre_hook(_before_call)
    return model


def _before_call(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if model.training:
        forget(model)
    size = vars(model).get("fixed_size")
    if size is None or not args:
        return None
    if isinstance(args[0], fx.Proxy):  # a step of the graph that is traced
        return args[0].tracer.create_proxy("call_function", checked_size, (args[0], size), {}), *args[1:]
    return checked_size(args[0], size), *args[1:]


def require_size(model: nn.Module, x: Tensor) -> None:
    """Raise where a graph's constants are not those of inputs like x (N, ...).

    Raises:
        ValueError: naming both sizes.
    """
    if isinstance(model, GraphNet) and "fixed_size" in vars(model):
        checked_size(x, vars(model)["fixed_size"])


def checked_size(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return x (N, ...).

    Raises:
        ValueError: x is not of the size (without N) that the graph's constants hold for.
    """
    if tuple(x.shape[1:]) != tuple(size):
        wanted, found = (" x ".join(map(str, shape)) for shape in (size, x.shape[1:]))
        raise ValueError(
            f"this network holds constants for inputs of {wanted} alone, got {found}; gate or compact it with an "
            f"example of that size"
        )
    return x
