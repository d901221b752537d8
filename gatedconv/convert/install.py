"""Gates in a user's own modules: a gate becomes a submodule, a forward hook multiplies by its decision.

Hooks leave the modules' classes, names and code as they are. They are objects of this module without a reference to
the model, so that copies and pickles of a gated model take them along.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gatedconv import ops
from gatedconv.gating import FrozenGate, Gate, find_gates, forget
from gatedconv.gating.gates import LearnedGate
from gatedconv.nn.modules import FrozenConv2d, take_place

_all_samples = 0  # above 0: branches compute all samples in eval, too


@contextmanager
def computing_all_samples() -> Iterator[None]:
    """Context in which all samples are computed, so that shapes do not depend on gates."""
    global _all_samples
    _all_samples += 1
    try:
        yield
    finally:
        _all_samples -= 1


class Decision(NamedTuple):
    """What a gate decided in one forward.

    ``value``: (N, num_gates). ``selected``: int64 (K,), the samples that a branch computes; None for all.
    ``backward``: the backward pass inside of which a checkpoint ran this forward again; -1 for none.
    ``thread``: that ran the forward; 0 in compiled code.
    """

    value: Tensor
    selected: Tensor | None
    backward: int
    thread: int


class _Pending:
    """A hook on a decision's gradient. The graph holds it, so it lives as long as a backward can come."""

    def __init__(self, decision: Decision) -> None:
        value = decision.value.detach().requires_grad_()  # without a reference to the graph
        self.decision, self.arrived = decision._replace(value=value), False

    def __call__(self, grad: Tensor) -> None:
        self.arrived = True


class Link:
    """The decision of a gate on its way from the place where it is made to the places where it is used."""

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self._pending: list[weakref.ref[_Pending]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A decision belongs to one forward."""
        return {"decision": None, "_pending": []}

    def note(self, value: Tensor, selected: Tensor | None = None) -> None:
        """Keep the decision (N, num_gates) of this forward, and the samples that are computed."""
        compiling = torch.compiler.is_compiling()
        where = (-1, 0) if compiling else (torch._C._current_graph_task_id(), threading.get_ident())
        self.decision = Decision(value, selected, *where)
        plain = not compiling and not torch._C._are_functorch_transforms_active()
        if plain and value.requires_grad and self.decision.backward < 0:
            pending = _Pending(self.decision)
            value.register_hook(pending)
            self._pending = [ref for ref in self._pending if ref() is not None] + [weakref.ref(pending)]

    def read(self, module: nn.Module) -> Decision:
        """The decision of this forward, or of the one that a checkpoint runs again for a backward.

        Raises:
            RuntimeError: there is none, or more than one it may be, or another thread made it.
        """
        decision = self.decision  # another thread may replace it
        if decision is None or getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"gate_model: the {type(module).__name__} at the end of a gated branch ran without the module at its "
                f"start; nn.DataParallel is not supported, use DistributedDataParallel"
            )
        if torch.compiler.is_compiling():
            return decision
        if decision.backward == torch._C._current_graph_task_id():
            if decision.thread not in (0, threading.get_ident()):
                raise RuntimeError(
                    "gate_model: two threads run a network with gated branches at the same time; give each a copy, or "
                    "compact it"
                )
            return decision
        alive = [pending for ref in self._pending if (pending := ref()) is not None]
        waiting = [pending for pending in alive if not pending.arrived] or alive
        if len(waiting) > 1:
            raise RuntimeError(
                f"gate_model: after {len(waiting)} forwards a checkpoint runs the {type(module).__name__} of a gated "
                f"branch again, but not the module at its start; run backward after each forward, or let the "
                f"checkpoint hold the whole block"
            )
        return waiting[0].decision if waiting else decision


def _guard_hooks() -> None:
    """Have torch.compile guard on hooks: else it runs a gated model by the graph of the dense one, of the same class.

    By default it does not (pytorch/pytorch#98371).
    """
    from torch import _dynamo

    if _dynamo.config.skip_nnmodule_hook_guards:
        _dynamo.config.skip_nnmodule_hook_guards = False
        _dynamo.reset()  # graphs of the dense model that were compiled without these guards


def over_channels(gates: Tensor, channels: int) -> Tensor:
    """(..., num_gates) -> (..., channels): what each gate has is repeated for all channels of its group."""
    return gates.repeat_interleave(channels // gates.shape[-1], dim=-1)


class GateHook:
    """A hook of a gated module.

    Attributes:
        name: of the gate among the module's children; "" where another module holds it.
        axis: the channels' dimension of what is read or multiplied.
        link: carries the decision from or to another hook.
        alone: whether nothing but the module itself reads its parameters, so that `freeze` may zero those it closes.
        convs: convolutions that compute nothing but what this gate may close.
    """

    of_gatedconv = True

    def __new__(cls, *args: Any, **kwargs: Any) -> GateHook:
        """Also of copies and pickles."""
        _guard_hooks()
        return super().__new__(cls)

    def __init__(
        self,
        name: str = "",
        axis: int = 1,
        link: Link | None = None,
        convs: tuple[nn.Module, ...] = (),
        alone: bool = False,
    ) -> None:
        self.name, self.axis, self.link, self.convs, self.alone = name, axis, link, convs, alone

    def gate(self, module: nn.Module) -> nn.Module:
        """The gate."""
        found: nn.Module = getattr(module, self.name)
        return found

    def _decide(self, module: nn.Module, x: Tensor) -> Tensor:
        image = x if self.axis == 1 else x.movedim(self.axis, 1)
        decision: Tensor = self.gate(module)(image)
        return decision

    def _scaled(self, x: Tensor, decision: Tensor) -> Tensor:
        if decision.shape[1] != x.shape[self.axis]:
            decision = over_channels(decision, x.shape[self.axis])
        if self.axis == 1 and x.dim() == 4:
            return ops.gated_scale(x, decision)
        shape = [x.shape[0] if d == 0 else -1 if d == self.axis else 1 for d in range(x.dim())]
        return x * decision.reshape(shape)


class GateOutputHook(GateHook):
    """Forward hook: the module's output times its gate's decision on that output."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Gate the output."""
        decision = self._decide(module, output)
        if self.link is not None:
            self.link.note(decision)
        return self._scaled(output, decision)


class GateInput(GateHook):
    """Forward pre-hook: the module reads its input times its gate's decision on that input."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gate the input."""
        return self._scaled(args[0], self._decide(module, args[0])), *args[1:]


class FollowGate(GateHook):
    """Forward hook: the output times the decision of another module's gate, behind a depthwise convolution."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Gate the output by the decision of another gate."""
        assert self.link is not None
        return self._scaled(output, self.link.read(module).value)


class DecideBranch(GateHook):
    """Forward pre-hook at the start of a residual branch: the layer gate decides on what the branch reads."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Decide, and leave the input as it is."""
        assert self.link is not None
        decision = self._decide(module, args[0])
        all_samples = module.training or _all_samples or torch.compiler.is_compiling()
        some = not all_samples and isinstance(self.gate(module), LearnedGate)
        self.link.note(decision, decision.flatten().nonzero().flatten() if some else None)


class SelectSamples(GateHook):
    """Forward pre-hook of a branch's first layer: in eval it computes the samples whose gate is open, and no other."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Select."""
        assert self.link is not None
        selected = self.link.read(module).selected
        if selected is None or len(selected) == len(args[0]):
            return args
        return args[0].index_select(0, selected), *args[1:]


class GateBranch(GateHook):
    """Forward hook at the end of a residual branch: (N, ...) times the decision (N, 1)."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Gate the branch."""
        assert self.link is not None
        decision, selected, *_ = self.link.read(module)
        if selected is not None and len(selected) == len(decision):
            return output  # open for every sample: times 1
        if selected is not None and len(output) != len(decision):
            return output.new_zeros(len(decision), *output.shape[1:]).index_copy(0, selected, output)
        decision = decision.reshape(-1, *[1] * (output.dim() - 1)).to(output.dtype)
        if not decision.requires_grad:  # a closed branch of frozen convolutions may hold NaN, of 0 / 0
            output = output.masked_fill(decision == 0, 0)
        return output * decision


class BeforeForward:
    """Forward pre-hook of the whole model: it drops what the last forward left.

    Attributes:
        links: between hooks; in training their decisions, and what every gate keeps, are dropped.
        repeated: the paths of the gates that decide several times in a forward, which forget the last one in eval, too.
    """

    of_gatedconv = True

    def __init__(self, links: list[Link], repeated: list[str]) -> None:
        self.links, self.repeated = links, repeated

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Drop gates' outputs and decisions."""
        for path in self.repeated:
            gate: Any = model
            for name in path.split("."):
                gate = getattr(gate, name, None)
            if isinstance(gate, Gate):  # its module is still there
                gate.forget()
        if model.training:
            forget(model)
            for link in self.links:
                link.decision = None


def repeated_gates(model: nn.Module) -> list[str]:
    """The paths of the gates that decide several times in one forward."""
    return [path for path, gate in find_gates(model).items() if gate.calls > 1]


def hooks_of(module: nn.Module) -> list[GateHook]:
    """The gates' hooks of one module, in the order in which they run."""
    found: tuple[Any, ...] = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in found if isinstance(hook, GateHook)]


def link_ends(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module that reads the decision of another module's gate, after the path of that gate."""
    starts = {}
    for path, module in model.named_modules():
        starts.update({id(hook.link): f"{path}.{hook.name}".strip(".") for hook in hooks_of(module) if hook.name})
    for module in model.modules():
        for hook in hooks_of(module):
            if hook.link is not None and not hook.name:
                yield starts[id(hook.link)], module


def masks_by_link(model: nn.Module) -> dict[int, Tensor]:
    """The frozen masks that travel over links, by the links' ids."""
    masks = {}
    for module in model.modules():
        for hook in hooks_of(module):
            if hook.link is not None and hook.name:
                gate = hook.gate(module)
                if isinstance(gate, FrozenGate):
                    masks[id(hook.link)] = gate.mask
    return masks


def mask_of(hook: GateHook, module: nn.Module, links: dict[int, Tensor]) -> Tensor | None:
    """The mask that a hook multiplies by, None while its gate learns."""
    if hook.link is not None and not hook.name:
        return links.get(id(hook.link))
    gate = hook.gate(module)
    return gate.mask if isinstance(gate, Gate) else None


def remove_gates(model: nn.Module) -> None:
    """Take every gate and hook of ``install`` off a model, in place."""
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "of_gatedconv", False):
                    del hooks[key]
                    if isinstance(hook, GateHook) and hook.name:
                        delattr(module, hook.name)


def skip_closed(model: nn.Module) -> None:
    """Let the convolutions of a frozen model compute open channels alone; in place."""
    links = masks_by_link(model)
    paths = {id(module): name for name, module in model.named_modules()}
    closed: dict[str, Tensor] = {}
    for module in model.modules():
        for hook in hooks_of(module):
            mask = mask_of(hook, module, links)
            if mask is None or bool(mask.all()):
                continue
            for conv in hook.convs:
                path = paths.get(id(conv))
                if path is None or type(conv) is not nn.Conv2d or "forward" in vars(conv):
                    continue
                if "weight" not in conv._parameters:
                    continue
                mine = over_channels(mask, conv.out_channels)
                closed[path] = closed[path] & mine if path in closed else mine
    for path, mask in closed.items():
        conv = model.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        frozen = FrozenConv2d(conv, mask).train(conv.training)
        frozen._modules.update({name: child for name, child in conv._modules.items() if name != "gate"})
        take_place(frozen, conv)
        model.set_submodule(path, frozen)


@contextmanager
def keeping_aliases(model: nn.Module) -> Iterator[None]:
    """Context in which a replaced module is also replaced in lists, tuples and dicts held as attributes."""
    before = dict(model.named_modules())
    yield
    after, seen = dict(model.named_modules()), set()
    swapped = {id(old): new for path, old in before.items() if (new := after.get(path, old)) is not old}

    def swap(item: Any) -> Any:
        if isinstance(item, tuple):
            parts = [swap(part) for part in item]
            if all(new is part for new, part in zip(parts, item, strict=True)):
                return item  # of whatever class
            return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
        if isinstance(item, (list, dict)) and id(item) not in seen:
            seen.add(id(item))
            for key, part in list(item.items() if isinstance(item, dict) else enumerate(item)):
                if (new := swap(part)) is not part:  # some classes do not let items be set
                    item[key] = new
        return swapped.get(id(item), item)

    for module in list(model.modules()) if swapped else ():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                vars(module)[name] = swap(value)


def attach(module: nn.Module, gate: Gate, base: str) -> str:
    """Make the gate a child of the module, as ``base`` or, where that is taken, with a number; return the name."""
    name, count = base, 1
    while hasattr(module, name):
        count += 1
        name = f"{base}_{count}"
    module.add_module(name, gate)
    return name


def device_of(*modules: nn.Module) -> torch.device | None:
    """Where the first module that has tensors is; None, the default device, if none has."""
    return next((t.device for module in modules for t in (*module.parameters(), *module.buffers())), None)


@torch.no_grad()
def open_gate(gate: Any) -> Any:
    """Set a new gate to open whatever it reads: its logits are 0.5, inside the estimators' windows.

    Features of a pretrained network can be of any magnitude, so the last layer's weights start at zero.
    ``batch_mean`` compares logits with each other and would find all of them equal: it gets tiny ones.
    """
    if gate.estimator.name == "batch_mean":
        gate.fc2.weight.mul_(1e-3)
    else:
        nn.init.zeros_(gate.fc2.weight)
    return gate
