"""``gate_model``: a gated copy of any convolutional network."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv.convert.branches import Branch, find_branches, runs_empty
from gatedconv.convert.canonical import canonicalize, free_path, set_module, settle_inplace
from gatedconv.convert.conversion import Choice, Conversion, Selection
from gatedconv.convert.costs import graph_mac_terms, reachable_share
from gatedconv.convert.flow import Flow
from gatedconv.convert.sites import Site, SiteFinder, open_gate
from gatedconv.convert.swap import swap_modules
from gatedconv.convert.trace import TraceFailure, evaluate_shapes, fixed_to_eval, trace
from gatedconv.gating import ESTIMATORS, ChannelGate, LayerGate, find_gates, unwrap
from gatedconv.nn import AddBranch, GraphNet, SelectOpen
from gatedconv.nn.graph_net import require_size

GATES = ("layer", "channel", "both")
POSITIONS = ("after", "middle", "before")
EXPORTED = "torch.fx could not follow the model: image size and random layers are as torch.export saw them"


def gate_model(
    model: nn.Module, gate: str = "layer", *, position: str = "after", estimator: str = "ste",
    example_input: Tensor, include: Choice = None, exclude: Choice = None,
) -> nn.Module:  # fmt: skip
    """A gated copy of any convolutional network that can be written down as a graph; weights are kept.

    A layer gate goes on every residual branch (found from the additions of the graph; projection
    shortcuts stay), a channel gate on every convolution. Gates start open: in eval the result computes
    what ``model`` does. Parameters keep their names.

    Args:
        model: any network that takes images (N, C, H, W); left as it is.
        gate: "layer", "channel" or "both".
        position: of the channel gates. "after": behind the norm that follows a convolution, or behind the
            convolution where there is none. "middle": behind the activation after that, so the output of
            a residual branch is not gated. "before": on the input of each residual branch, the shortcut
            ungated, and of each convolution outside of them.
        estimator: "ste", "gumbel", "bernoulli" or "batch_mean".
        example_input: (N, C, H, W) that the model accepts; MACs are counted at its size.
        include: gate only these layers and blocks: a name (a block's stands for all inside it), a pattern
            as of ``fnmatch``, a list of them, or a function (name, module) -> bool.
        exclude: leave these alone.

    Returns:
        the gated network, a ``torch.fx.GraphModule``, with ``mac_terms`` and with ``conversion``, which
        lists every gate and, with its reason, every layer that has none. A network that neither torch.fx
        nor torch.export can follow keeps its code; then channel gates are put into its Conv2d layers.

    Raises:
        TypeError, ValueError: arguments out of range, a pattern that matches nothing, or no place for a
            gate at all.
    """
    _check(model, gate, position, estimator, example_input)
    selection = Selection(include, exclude)
    source = _copied(unwrap(model))
    require_size(source, example_input)
    try:
        graph_module, traced_by = trace(source, example_input)
    except TraceFailure as failure:
        _require_runs(source, example_input)
        return swap_modules(source, selection, gate, position, estimator, example_input, str(failure))
    notes = [EXPORTED] if traced_by != "fx" else []
    if fixed := fixed_to_eval(source, graph_module.graph):
        named = ", ".join(name or f"the model ({type(source).__name__})" for name in fixed)
        notes.append(f"in training as in eval, what depends on self.training in the forward of: {named}")
    canonicalize(graph_module, source)
    evaluate_shapes(graph_module, example_input)
    conversion = Conversion(traced_by, note="; ".join(notes))
    device = example_input.device
    _insert_gates(graph_module, gate, position, lambda g: open_gate(g).to(device), estimator, selection, conversion)
    selection.require_used()
    if not conversion.gated:
        nothing = "it has no residual branches" if gate == "layer" else "it has no convolutions"
        reasons = "; ".join(sorted(set(conversion.skipped.values()))[:5]) or nothing
        raise ValueError(f"gate_model: no place for a {gate!r} gate in {type(unwrap(model)).__name__}: {reasons}")
    exported = "train" in vars(unwrap(model))  # a module of torch.export: it computes in one mode, whatever it says
    training = model.training and not exported
    result = _finish(graph_module, type(unwrap(model)).__name__, conversion, example_input, training)
    if "fixed_size" in vars(source):  # a cut network, gated once more
        vars(result)["fixed_size"] = vars(source)["fixed_size"]
    return result


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"gate_model: {type(model).__name__} cannot be copied (copy.deepcopy): {error}") from error


def _require_runs(model: nn.Module, example_input: Tensor) -> None:
    """Tell a model that cannot be traced from one that cannot even run."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example_input)
    except Exception as error:  # whatever the model's code raises
        what = f"{tuple(example_input.shape)}, {example_input.dtype}, on {example_input.device}"
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"gate_model: {type(model).__name__} does not run on example_input ({what}): {why}") from error
    finally:
        for module, flag in training.items():
            module.training = flag


def _finish(
    graph_module: fx.GraphModule, name: str, conversion: Conversion, example_input: Tensor, training: bool
) -> GraphNet:
    graph_module.graph.lint()
    settle_inplace(graph_module)
    result = GraphNet(graph_module, graph_module.graph, name)
    result.eval()
    evaluate_shapes(result, example_input)
    terms = graph_mac_terms(Flow(result), conversion.gated)
    conversion.reachable_macs = reachable_share(terms)
    vars(result).update(mac_terms=terms, conversion=conversion, input_size=tuple(example_input.shape[1:]))
    for node in result.graph.nodes:
        node.meta.pop("val", None)
    return result.train(training)  # type: ignore[return-value]


def _insert_gates(
    graph_module: fx.GraphModule, gate: str, position: str, opened: Any, estimator: str, selection: Selection,
    conversion: Conversion,
) -> None:  # fmt: skip
    flow = Flow(graph_module)
    branches, rejected = find_branches(flow)
    sites: list[Site] = []
    if gate in ("channel", "both"):
        finder = SiteFinder(flow, branches, selection)
        sites = finder.find(position)
        conversion.skipped.update(finder.skipped)
    if gate in ("layer", "both"):
        conversion.skipped.update(rejected)
        for branch in branches:
            reason = _layer_reason(branch, graph_module, selection)
            if reason:
                conversion.skipped.setdefault(branch.name or branch.addition.name, reason)
                continue
            path = free_path(graph_module, f"{branch.name}.layer_gate".lstrip("."))
            conversion.gated[path] = f"the residual branch of {branch.name or 'the model'}"
            _gate_branch(graph_module, branch, path, opened, estimator)  # from here on the addition is a module's call
    axes = {site: flow[site.node].axis for site in sites}
    factors: dict[Site, fx.Node] = {}
    for site in sites:
        if site.follows is not None:
            _multiply(graph_module, site.node, list(site.node.users), factors[site.follows])
            continue
        suffix = ".channel_gate" if site.is_block else "_gate"
        path = free_path(graph_module, f"{site.name}{suffix}".lstrip("."))
        factors[site] = _gate_channels(graph_module, site, axes[site], path, opened, estimator)
        conversion.gated[path] = f"the {'input' if site.readers else 'output'} channels of {site.name}"


def _layer_reason(branch: Branch, graph_module: fx.GraphModule, selection: Selection) -> str:
    reason = selection.reason(branch.name, graph_module.get_submodule(branch.name))
    if reason:
        return reason
    parameters = [
        p for n in branch.nodes if n.op == "call_module" for p in graph_module.get_submodule(str(n.target)).parameters()
    ]
    if parameters and not any(p.requires_grad for p in parameters):
        return "its weights are frozen (requires_grad=False)"
    return ""


def _gate_branch(graph_module: fx.GraphModule, branch: Branch, path: str, opened: Any, estimator: str) -> None:
    """Addition = shortcut + part  becomes  AddBranch(shortcut, part of the open samples, gate(entry))."""
    graph = graph_module.graph
    entry = _as_read(graph_module, branch.entry, branch.nodes)
    set_module(graph_module, path, opened(LayerGate(entry.meta["val"].shape[1], estimator=estimator)))
    select_path, add_path = (free_path(graph_module, path.removesuffix("layer_gate") + n) for n in ("select", "add"))
    set_module(graph_module, select_path, SelectOpen(0 if runs_empty(branch, graph_module) else 1))
    set_module(graph_module, add_path, AddBranch())
    readers = [n for n in entry.users if n in branch.nodes]
    with graph.inserting_after(entry):
        decision = graph.call_module(path, (entry,))
    with graph.inserting_after(decision):
        selected = graph.call_module(select_path, (entry, decision))
    for reader in readers:
        reader.replace_input_with(entry, selected)
    addition = branch.addition
    shortcut = next(a for a in addition.args[:2] if a is not branch.part)
    addition.op, addition.target, addition.kwargs = "call_module", add_path, {}
    addition.args = (shortcut, branch.part, decision)
    selected.meta.update(entry.meta)


def _as_read(graph_module: fx.GraphModule, node: fx.Node, readers: set[fx.Node]) -> fx.Node:
    """The node itself or, where a branch around the readers was gated before, its selection of samples."""
    for source in {n for reader in readers for n in reader.all_input_nodes}:
        origin = source
        while origin.op == "call_module" and isinstance(graph_module.get_submodule(str(origin.target)), SelectOpen):
            origin = origin.args[0]  # type: ignore[assignment]
        if origin is node:
            return source
    return node


def _gate_channels(
    graph_module: fx.GraphModule, site: Site, axis: int, path: str, opened: Any, estimator: str
) -> fx.Node:
    """Readers of ``site.node`` get its value times the gate's decision, which is returned."""
    graph = graph_module.graph
    node = site.node if site.readers is None else _as_read(graph_module, site.node, site.readers)
    readers = [n for n in node.users if site.readers is None or n in site.readers]
    set_module(graph_module, path, opened(ChannelGate(node.meta["val"].shape[axis], estimator=estimator)))
    with graph.inserting_after(node):
        image = node if axis == 1 else graph.call_method("permute", (node, 0, 3, 1, 2))
    with graph.inserting_after(image):
        decision = graph.call_module(path, (image,))
    index = (slice(None), *([slice(None), None, None] if axis == 1 else [None, None, slice(None)]))
    with graph.inserting_after(decision):
        factor = graph.call_function(operator.getitem, (decision, index))
    _multiply(graph_module, node, readers, factor)
    return factor


def _multiply(graph_module: fx.GraphModule, node: fx.Node, readers: list[fx.Node], factor: fx.Node) -> None:
    """``readers`` get ``node * factor`` for ``node``, behind the later of the two."""
    order = {n: index for index, n in enumerate(graph_module.graph.nodes)}
    with graph_module.graph.inserting_after(max(node, factor, key=order.__getitem__)):
        product = graph_module.graph.call_function(torch.mul, (node, factor))
    product.meta.update(node.meta)
    for reader in readers:
        reader.replace_input_with(node, product)


def _check(model: Any, gate: str, position: str, estimator: str, example_input: Any) -> None:
    if not isinstance(model, nn.Module):
        hint = ": pass its .module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise TypeError(f"gate_model: model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("gate_model: a TorchScript module has no code left to trace; pass the torch.nn.Module itself")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("gate_model: the model has lazy layers without weights; run it on an image once")
    if gates := find_gates(unwrap(model)):
        raise ValueError(
            f"gate_model: the model has gates already (as {next(iter(gates))!r}); pass the network without gates, "
            f"gate='both' puts in both kinds; what is frozen can be cut first, by gatedconv.compact"
        )
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        kind = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise TypeError(f"gate_model: example_input must be a tensor (N, C, H, W), got {kind}")
    if not example_input.is_floating_point():
        raise TypeError(f"gate_model: example_input must be of a floating-point type, got {example_input.dtype}")
    for name, value, allowed in (
        ("gate", gate, GATES),
        ("position", position, POSITIONS),
        ("estimator", estimator, ESTIMATORS),
    ):
        if value not in allowed:
            raise ValueError(f"gate_model: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
