"""Whether two models compute the same: on the example, another batch, another image size, and in training."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from gatedconv._io import first_line
from gatedconv.convert.record import open_up
from gatedconv.gating import copied

# Of max|a - b| / max|b|: what another order of summation may cost over many layers, by the type's precision.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of a gradient's largest entry: its sums over the batch cancel, which amplifies rounding.
GRADIENT_ERROR = 1e-2


class ConversionError(ValueError):
    """A result does not compute what its source does; the message names the first layer that differs."""


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_OTHER_NUMBERS: dict[type, Callable[[Any], Any]] = {
    float: lambda number: number * 1.5 + 0.25,
    int: lambda number: number + 1,
    bool: lambda flag: not flag,
}
Locate = Callable[[nn.Module, nn.Module, Inputs], str]


def as_inputs(example_input: Any) -> Inputs:
    """Positional and keyword arguments of a model: a tensor, a tuple of arguments, or a dict of them."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (tuple(example_input), {}) if isinstance(example_input, (tuple, list)) else ((example_input,), {})


@torch.no_grad()
def require_same(
    source: nn.Module,
    result: nn.Module,
    example_input: Any,
    owner: str,
    *,
    locate: Locate | None = None,
    integers: bool = True,
    precision: torch.dtype | None = None,
    copies: bool = True,
) -> None:
    """Raise unless both give the same in eval mode, on every variation of the example that the source takes.

    Costs three forwards of each. Copies run, since some code changes its own state in eval, too. Random numbers are
    those of one seed. Where the outputs differ, double precision decides whether the models do or whether the network
    amplifies rounding: at most twice the source's own error.

    Args:
        source: the oracle.
        result: what is checked.
        example_input: as of ``gate_model``.
        owner: the name that the message begins with.
        locate: (source, result, inputs) -> the first layer that differs; None: modules are compared by their paths.
        integers: compare integer outputs, too; rounding can move an argmax.
        precision: the type that ``result`` computes in, None for that of its outputs.
        copies: False for a result that has no state, which then runs itself.

    Warns:
        UserWarning: the outputs are empty, as those of a detector that finds nothing.

    Raises:
        ConversionError: they differ.
    """
    locate, models, in_step, compared = locate or first_difference, (source, result), False, 0
    for alternatives in _variations(as_inputs(example_input)):
        for what, inputs in alternatives:
            if not in_step:  # both have run the same inputs
                source, result = copied(models[0]), copied(models[1]) if copies else models[1]
                for model in (source, result):
                    model.eval()  # a class with a train() of its own may return nothing from it
            try:
                wanted, in_step = run_seeded(source, inputs), True
            except Exception:  # a size that the source does not take
                in_step = False
                continue
            if not tensors_of(wanted):
                raise ConversionError(f"{owner}: its output holds no tensor that could be compared")
            try:
                got = run_seeded(result, inputs)
            except Exception as error:
                raise ConversionError(
                    f"{owner}: the result fails on {what}: {type(error).__name__}: {error}"
                ) from error
            if not integers and len(tensors_of(got)) == len(tensors_of(wanted)):
                got, wanted = ([t for t in tensors_of(o) if _is_float(t) or t.is_complex()] for o in (got, wanted))
            difference = distance(got, wanted)
            compared += sum(t.numel() for t in tensors_of(wanted))
            allowed = _tolerance(wanted) if precision is None else TOLERANCES[precision]
            if not difference <= allowed and not _is_rounding(source, result, inputs, wanted, difference, 10 * allowed):
                try:
                    where = locate(source, result, inputs)
                except Exception:  # a plan of a part of the network, or hooks, may fail where the whole runs
                    where = "a layer that could not be found"
                raise ConversionError(f"{owner}: the result differs by {difference:.1e} on {what}, first at {where}")
            break
    if not compared:
        warnings.warn(
            f"{owner}: the outputs of {type(models[0]).__name__} are empty on example_input, so that no numbers were "
            f"compared; pass an example with results",
            stacklevel=6,  # of the caller of the public function, past the decorators
        )


def _is_rounding(
    source: nn.Module, result: nn.Module, inputs: Inputs, wanted: Any, difference: float, most: float
) -> bool:
    """Whether a difference is rounding: none in double precision, or at most twice the error that the source makes.

    A constant that replaces a part of the network is rounded, too, which double precision cannot undo.
    """
    try:
        exact, got = (
            run_seeded(copied(model).double(), tree_map(lambda t: t.double() if _is_float(t) else t, inputs))
            for model in (source, result)
        )
    except Exception:  # code or kernels of one type
        return False
    if not {t.dtype for t in tensors_of((exact, got)) if t.is_floating_point()} <= {torch.float64}:
        return False
    left, own = distance(got, exact), distance(wanted, exact)
    small = math.isfinite(own) and max(left, difference) <= min(2 * own, most)
    return left <= TOLERANCES[torch.float64] or small


def _is_float(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def require_same_training(source: nn.Module, result: nn.Module, example_input: Any, owner: str) -> str:
    """One training-mode forward and backward of two models: outputs, gradients and buffers have to agree.

    ``result`` may have more parameters; those of ``source`` are compared by name. Both are changed.

    Returns:
        why it could not be checked, empty if it was.

    Raises:
        ConversionError: they differ.
    """
    inputs = as_inputs(example_input)
    runs = []
    for model in (source, result):
        model.train()
        try:
            with torch.enable_grad():
                out = run_seeded(model, inputs)
                floats = [t for t in tensors_of(out) if t.is_floating_point() and t.requires_grad]
                if floats:
                    torch.stack([t.float().square().mean().cpu() for t in floats]).sum().backward()
        except Exception as error:
            if model is result:
                raise ConversionError(f"{owner}: the result fails in training: {error}") from error
            return f"training was not checked: {type(error).__name__}: {first_line(error)}"
        runs.append(out)
    if not (difference := distance(runs[1], runs[0])) <= _tolerance(runs[0]):
        raise ConversionError(f"{owner}: in training the result differs by {difference:.1e}")
    state = dict(result.named_parameters()) | dict(result.named_buffers())
    gradients = [p.grad for p in source.parameters() if p.grad is not None]
    largest = max((float(g.abs().max()) for g in gradients if g.numel()), default=0.0)
    for name, tensor in (*source.named_parameters(), *source.named_buffers()):
        mine = state.get(name)
        if mine is None or (tensor.grad is None) != (mine.grad is None) or not _near(mine.grad, tensor.grad, largest):
            raise ConversionError(f"{owner}: in training the gradient of {name} differs")
        if distance(mine, tensor) > _tolerance(tensor):
            raise ConversionError(f"{owner}: after a training step the value of {name} differs")
    return ""


def _near(got: Tensor | None, wanted: Tensor | None, largest: float) -> bool:
    """Whether gradients agree but for the order in which they were added up."""
    if got is None or wanted is None or not wanted.numel():
        return True
    scale = max(float(wanted.abs().max()) * GRADIENT_ERROR, largest * TOLERANCES[torch.float32])
    return bool(((got - wanted).abs() <= scale).logical_or(got.isnan() & wanted.isnan()).all())


def tensors_of(structure: Any) -> list[Tensor]:
    """The tensors of an output: of tuples, lists, dicts, dataclasses."""
    return [t for t in tree_flatten(open_up(structure))[0] if isinstance(t, Tensor)]


def distance(got: Any, wanted: Any) -> float:
    """max|got - wanted| / max|wanted| over all tensors; inf where structure or shapes differ.

    A NaN or an infinity at the same place of both is no difference; on one side alone it is inf.
    """
    a, b = tensors_of(got), tensors_of(wanted)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return math.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        wide = torch.complex128 if y.is_complex() else torch.float64  # masks of booleans, too, have no difference
        x, y = x.detach().to(wide), y.detach().to(wide)
        same = (x == y) | (x.isnan() & y.isnan())
        if y.numel() and not bool(same.all()):
            apart, largest = torch.where(same, 0, (x - y).abs()).abs().max(), y.abs().nan_to_num(0, 0, 0).max()
            found = float(apart / largest.clamp(min=1e-30))
            worst = max(worst, found if found == found else math.inf)
    return worst


def is_same(got: Any, wanted: Any) -> bool:
    """Whether two outputs differ by rounding alone."""
    return distance(got, wanted) <= _tolerance(wanted)


def _tolerance(structure: Any) -> float:
    single = TOLERANCES[torch.float32]
    return max((TOLERANCES.get(t.dtype, single) for t in tensors_of(structure)), default=single)


def run_seeded(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output on copies of its inputs; run with a fixed seed; the global random state is restored."""
    devices = {t.device for t in tensors_of(inputs) if t.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(devices)):
            # Not torch.manual_seed: it seeds every device, and fork_rng restores these alone.
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)):
                generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            args, kwargs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
            return model(*args, **kwargs)
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@torch.no_grad()
def trains(model: nn.Module, example_input: Any) -> bool:
    """Whether code that runs in training alone, such as an auxiliary head, takes the tensors of the model."""
    inputs = as_inputs(example_input)
    if isinstance(example_input, Tensor) and len(example_input) == 1:
        inputs = as_inputs(torch.cat([example_input, example_input]))
    trial = copied(model)
    try:
        trial.train()
        run_seeded(trial, inputs)
    except Exception:  # whatever the layers raise
        return False
    return True


def _variations(inputs: Inputs) -> Iterator[list[tuple[str, Inputs]]]:
    """The example; other values of it, in a larger batch where there can be one; larger images; other numbers.

    Each with its name, and followed by what to try where the source does not take it.
    """

    def changed(change: Any) -> Inputs:
        return tree_map(lambda t: change(t) if _is_float(t) else t, inputs)  # type: ignore[no-any-return]

    yield [("example_input", inputs)]
    yield [
        ("a larger batch", changed(lambda t: torch.cat([t, t.flip(-1)[:1]]) * 1.5 + 0.25 if t.dim() > 1 else t)),
        ("a larger batch", changed(lambda t: torch.cat([t, t.flip(-1)]) * 1.5 + 0.25 if t.dim() > 1 else t)),
        ("other values", changed(lambda t: t * 1.5 + 0.25 if t.dim() > 1 else t)),
    ]
    # Sizes that every division has to round or, where the source does not take them, those of pyramids of five levels;
    # of all images where the source folds several of them into one, such as the frames of a clip.
    yield [
        ("larger images", changed(lambda t, n=count, odd=odd: _few_larger(t, n, 32 + odd, 64 + odd)))
        for count, odd in ((2, 1), (2, 0), (None, 1), (None, 0))
    ]
    for kind, other in _OTHER_NUMBERS.items():
        if any(type(leaf) is kind for leaf in tree_leaves(inputs)):
            numbers = tree_map(lambda n, k=kind, o=other: o(n) if type(n) is k else n, inputs)
            yield [(f"another {kind.__name__} among the inputs", numbers)]


def _few_larger(x: Tensor, count: int | None, height: int, width: int) -> Tensor:
    """The first images, repeated, by so many pixels higher and wider; of what are no images the first rows, if any."""
    if x.dim() < 4:
        return x[:count] if x.dim() else x
    x = x[:count]
    rows = torch.arange(x.shape[-2] + height, device=x.device) % max(1, x.shape[-2])
    columns = torch.arange(x.shape[-1] + width, device=x.device) % max(1, x.shape[-1])
    return x.index_select(-2, rows).index_select(-1, columns)


def first_difference(source: nn.Module, result: nn.Module, inputs: Inputs) -> str:
    """The first module, in the order of execution, whose outputs differ in two models."""
    seen: list[dict[tuple[str, int], Any]] = []
    for model in (source, result):
        outputs: dict[tuple[str, int], Any] = {}
        with _outputs_of(model, outputs):
            run_seeded(model, inputs)
        seen.append(outputs)
    for (path, call), wanted in seen[0].items():
        got = seen[1].get((path, call))
        if path and got is not None and distance(got, wanted) not in (0.0, math.inf):
            if not is_same(got, wanted):
                return path
    return "the output itself"


@contextmanager
def _outputs_of(model: nn.Module, outputs: dict[tuple[str, int], Any]) -> Iterator[None]:
    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            count = sum(p == path for p, _ in outputs)
            outputs[path, count] = copy.deepcopy(tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output))

        return hook

    handles = [m.register_forward_hook(note(path)) for path, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
