"""Which channels of a frozen model are constant: what closed gates leave behind, followed through a recorded run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gatedconv.convert.flow import Flow, op_name
from gatedconv.convert.module_kinds import CONVS, groups_of
from gatedconv.convert.record import Node, Value

_EXTENSIVE = ("sum", "linalg_vector_norm", "logsumexp", "_softmax", "_log_softmax")  # depend on the map's size
_UNIFORM = 1e-6  # what rounding leaves between the pixels of an interpolation
_ARITHMETIC = ("add", "sub", "rsub", "pow", "clamp", "clamp_min", "clamp_max", "remainder", "fmod")  # 0 may not stay 0
MOST_CAUTION = 2  # see `channels.Removal`


@dataclass
class Masks:
    """Masks of the frozen gates: bool (C,) for each gated value, and for each value that one node reads gated.

    ``paths``: of the module whose output each gated value is.
    """

    values: Mapping[Value, Tensor]
    inputs: Mapping[tuple[Node, Value], Tensor]
    paths: Mapping[Value, str]


@dataclass
class Constants:
    """The constant channels of every value.

    No channel counts as constant for code that runs after the model has read the numbers of a tensor, nor, with the
    most caution, behind arithmetic with Python numbers, which may depend on the size of the input or be arguments of
    the model.

    Attributes:
        caution: as of `channels.Removal`.
        known: bool (C,): the channels that are constant.
        constant: (C,): their numbers; 0 elsewhere.
    """

    flow: Flow
    masks: Masks
    caution: int = 0

    def __post_init__(self) -> None:
        self.record = self.flow.record
        self.known: dict[Value, Tensor] = {}
        self.constant: dict[Value, Tensor] = {}
        with torch.no_grad():
            for node in self.record.nodes:
                for value in node.outputs:
                    if self.flow.has_channels(value):
                        self._find_constants(node, value)

    def zeros(self, value: Value) -> Tensor:
        """Bool (C,), nothing set."""
        return torch.zeros(self.flow[value].size, dtype=torch.bool, device="cpu")

    def known_to(self, node: Node, value: Value) -> tuple[Tensor, Tensor]:
        """Bool (C,) and numbers (C,): the constant channels of a value as one node reads it."""
        known, constant = self.known[value], self.constant[value]
        if self.record.is_late(node):
            known, constant = torch.zeros_like(known), torch.zeros_like(constant)
        mask = self.masks.inputs.get((node, value))
        return (known, constant) if mask is None else (known | ~mask, torch.where(mask, constant, 0.0))

    def known_to_layer(self, node: Node) -> tuple[Tensor, Tensor]:
        """Bool (C_in,) and numbers (C_in,): the inputs of a layer that are the same constants in all its calls."""
        known, constant = self.known_to(node, node.inputs[0])
        if not self.flow.is_uniform(node):
            return torch.zeros_like(known), torch.zeros_like(constant)
        for other in self.record.same_layer(node):
            also, numbers = self.known_to(other, other.inputs[0])
            known = known & also & (numbers == constant)
        return known, torch.where(known, constant, 0.0)

    def _find_constants(self, node: Node, value: Value) -> None:
        unknown = self.record.is_late(node) or self._varies(node) or self._is_called_again(node)
        known = self.zeros(value) if unknown else self._candidates(node, value)
        constant = torch.zeros(len(known), device="cpu")
        try:
            result = self._evaluate(node) if bool(known.any()) else None
        except Exception:  # it ran under autocast, or takes no single image
            result, known = None, self.zeros(value)
        if result is not None:
            result = result[value.index] if isinstance(result, (tuple, list)) else result
            rows = result[0].movedim(self.flow[value].axis - 1, 0).reshape(len(known), -1).cpu()
            if rows.is_complex():  # constants are real numbers
                rows = torch.view_as_real(rows).flatten(1)
                known = known & (rows == 0).all(dim=1)
            rows = rows.float()
            low, high = rows.amin(dim=1), rows.amax(dim=1)
            known = known & (high - low <= _UNIFORM * high.abs().clamp(min=1e-3)) & rows.isfinite().all(dim=1)
            if op_name(node) in _EXTENSIVE or (is_padded(node) and not isinstance(node.module, CONVS)):
                known = known & (rows == 0).all(dim=1)
            elif is_padded(node):  # at the border it sees zeros, which constants are not
                shown = self.known_to(node, node.inputs[0])[1].reshape(groups_of(node.module), -1)
                known = known & (shown == 0).all(dim=1).repeat_interleave(len(known) // len(shown))
            constant = torch.where(known, rows[:, 0], 0.0)
        mask = self.masks.values.get(value)
        if mask is not None:
            known, constant = known | ~mask, torch.where(mask, constant, 0.0)
        self.known[value], self.constant[value] = known, constant

    def _is_called_again(self, node: Node) -> bool:
        """Whether a node is one of several calls that share what is put around the layer: constants of one are no use.

        What a gate closes is the same in all of them.
        """
        value = node.outputs[0]
        framed = value in self.masks.values or self.flow.kind(value) in ("conv", "linear")
        return framed and len(self.record.same_layer(node)) > 1

    def _varies(self, node: Node) -> bool:
        """Whether a node computes with numbers that may be others for another input."""
        counts = self.caution == MOST_CAUTION and node.module is None and op_name(node) in _ARITHMETIC
        return counts and any(isinstance(item, (int, float)) and item for item in node.args[1:])

    def _candidates(self, node: Node, value: Value) -> Tensor:
        channels, none = self.flow[value], self.zeros(value)
        if channels.kind == "move":
            assert channels.source is not None and channels.index is not None
            return self.known[channels.source][channels.index]
        if channels.kind == "cat":
            return torch.cat([self.known[p] for p in node.args[0]])
        if channels.kind in ("conv", "linear", "regroup", "group_norm"):
            source = self.known_to(node, node.inputs[0])[0]
            groups = channels.size if channels.kind == "regroup" else groups_of(node.module)
            return source.reshape(groups, -1).all(dim=1).repeat_interleave(channels.size // groups)
        if channels.kind != "elementwise":
            return none
        operands = self.flow.operands(node)
        known = [self.known_to(node, o)[0].expand(channels.size) for o in operands]
        both = torch.stack(known).all(dim=0)
        if op_name(node) == "mul":
            for operand, mine in zip(operands, known, strict=True):
                both = both | (mine & (self.known_to(node, operand)[1] == 0).expand(channels.size))
        return both

    def _evaluate(self, node: Node) -> Any:
        """The node on one image whose constant channels are as they are, and others 0."""

        def image(item: Any) -> Any:
            if not isinstance(item, Value):
                return item
            if not self.flow.has_channels(item):
                return item.tensor.clone() if node.op.endswith("_") else item.tensor
            shape = [-1 if d == self.flow[item].axis else 1 for d in range(item.tensor.dim())]
            numbers = self.known_to(node, item)[1].to(item.tensor)
            return numbers.reshape(shape).expand(1, *item.tensor.shape[1:]).clone()

        args, kwargs = tree_map(image, (node.args, node.kwargs), is_leaf=lambda i: isinstance(i, Value))
        if node.op == "same":
            return args[0]
        if node.module is not None:
            return node.module(*args, **kwargs)
        if self.flow.kind(node.outputs[0]) == "move":
            return self._moved(node)
        return node.func(*args, **kwargs)

    def _moved(self, node: Node) -> list[Tensor]:
        """The outputs of a move, with every dimension but the channels' of size 1."""
        results = []
        for value in node.outputs:
            channels = self.flow[value]
            if channels.source is None or channels.index is None:
                results.append(torch.zeros(1, device="cpu"))
                continue
            numbers = self.constant[channels.source][channels.index]
            shape = [-1 if d == channels.axis else 1 for d in range(value.tensor.dim())]
            results.append(numbers.reshape(shape))
        return results


def is_padded(node: Node) -> bool:
    """Whether a layer sees zeros, or whatever its code puts there, around its input."""
    module = node.module
    if isinstance(module, nn.AvgPool2d):
        return module.padding not in (0, (0, 0))
    if op_name(node) == "avg_pool2d":
        padding = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
        return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    if isinstance(module, nn.ConvTranspose2d):
        return True  # the number of weights that an output pixel sums differs from pixel to pixel
    if not isinstance(module, nn.Conv2d):
        return False
    if max(module.kernel_size) == 1:
        return False
    exact = type(module).forward is nn.Conv2d.forward
    if isinstance(module.padding, str):
        return module.padding != "valid" or not exact
    return any(module.padding) or not exact
