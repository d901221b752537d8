"""Exporting a compact model to other runtimes: ONNX, torch.export, AOTInductor, and a plan of our own."""

from __future__ import annotations

import importlib.util
import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedconv._checks import require_choice
from gatedconv._io import first_line, silenced
from gatedconv.convert.example import does_not_run
from gatedconv.deploy.compact import compact
from gatedconv.deploy.engine_hooks import engine_hooks
from gatedconv.gating import copied, find_gates, require_frozen, unwrap

ONNX_OPSET = 18


@dataclass(frozen=True)
class About:
    """The images and the classes of a network, as a plan keeps them."""

    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor,
    format: str = "onnx",
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write a model for another runtime, in eval mode, with dynamic batch, height and width.

    Args:
        model: compact, or frozen (then it is compacted first), or without gates.
        path: the file to write; replaced as a whole or not at all.
        example_input: (N, C, H, W); N, H and W are fixed in the file only where the model fixes them. An ONNX file
            names its input "input" and its outputs "output", the keys of a dict, or "output_0", "output_1" and so on.
        format: "onnx" (opset 18, standard operators alone; needs the ``export`` extra), "torch" (a
            ``.pt2`` of torch.export), "aoti" (a compiled ``.pt2`` package of AOTInductor, for this
            machine's device; needs a C++ compiler) or "plan" (for gatedconv-runtime: one file for every CPU, which
            runs without PyTorch what `Engine` runs; needs a network of which the engine leaves nothing to PyTorch).
        classes: the names of the outputs; kept in a plan.
        mean: for each channel, of pixels from 0 to 1: the network's input is (pixel - mean) / std; kept in a plan.
        std: see mean.

    Raises:
        TypeError: the example is no tensor (N, C, H, W).
        IsADirectoryError: the path is a folder.
        ValueError: an unknown format, a model that still learns its gates, does not run on ``example_input``, or
            that the exporter cannot write; the exporter's own error is the cause. Classes, mean or std that do not
            fit the network, or of another format than "plan".
        ImportError: the packages that ONNX needs are missing.
    """
    require_choice("export", "format", format, _WRITERS)
    about = About(classes, mean, std)
    if format != "plan" and any(part is not None for part in (classes, mean, std)):
        raise ValueError(f"export: classes, mean and std are kept in a plan alone, not in {format!r}")
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        raise TypeError("export: example_input must be a tensor (N, C, H, W)")
    plain = _plain(unwrap(model), example_input)
    plain.eval()
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(plain.forward).parameters.values()):
        plain = _OneInput(plain)
    example = _batch(plain, example_input)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"export: {path} is a folder; expected the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporters, not for our user to mend
        part = Path(folder) / (path.name if format == "onnx" else "model.pt2")
        try:
            with torch.no_grad(), silenced():
                _WRITERS[format](plain, part, example_input if format == "plan" else example, about)
        except (ImportError, OSError):
            raise
        except Exception as error:  # whatever the exporters raise
            why = f"{type(model).__name__} cannot be written as {format!r}: {_origin(error)}"
            raise ValueError(f"export: {why}") from error
        os.replace(part, path)


class _OneInput(nn.Module):
    """Gives a network with ``forward(*args)``, such as an AveragedModel, the one named input that exporters need."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Any:
        return self.model(input)


def _origin(error: BaseException) -> str:
    """First line of the root cause; outer exceptions give advice for PyTorch developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def _plain(model: nn.Module, example_input: Tensor) -> nn.Module:
    require_frozen(model, "export")
    return compact(model, example_input) if find_gates(model) else copied(model)  # the caller's stays in its mode


@torch.no_grad()
def _batch(model: nn.Module, example_input: Tensor) -> Tensor:
    """Two images, since a batch of one would be taken for a constant; the example where the model takes no two."""
    image = example_input.detach()[:1] if len(example_input) else example_input.new_zeros((1, *example_input.shape[1:]))
    example = image.expand(2, *example_input.shape[1:]).contiguous()
    for images in (example, example_input.detach()):
        try:
            model(images.clone())
            return images.clone()
        except Exception as error:  # whatever the layers raise
            why = error
    raise does_not_run(model, (example_input,), why, "export") from why


def _dynamic(write: Callable[[tuple[int, ...]], Any]) -> Any:
    """Call ``write`` with batch, height and width dynamic, then with fewer of them, until it succeeds."""
    fixed = None
    for dims in ((0, 2, 3), (0, 3), (0, 2), (0,), (2, 3), (3,), (2,)):
        try:
            return write(dims)
        except (ImportError, OSError):
            raise
        except Exception:  # whatever the exporters raise
            fixed = fixed or write(())  # what cannot be written at all fails here, before the other attempts
    return fixed


def _program(model: nn.Module, example: Tensor) -> Any:
    def write(dims: tuple[int, ...]) -> Any:
        shapes = (dict.fromkeys(dims, torch.export.Dim.DYNAMIC),)
        return torch.export.export(model, (example.clone(),), dynamic_shapes=shapes)

    return _dynamic(write)


def _write_torch(model: nn.Module, path: Path, example: Tensor, about: About) -> None:
    torch.export.save(_program(model, example), path)


def _write_aoti(model: nn.Module, path: Path, example: Tensor, about: About) -> None:
    torch._inductor.aoti_compile_and_package(_program(model, example), package_path=str(path))


def _output_names(model: nn.Module, example: Tensor) -> list[str]:
    """Give "output" of a model with one, the keys of a dict, "output_0" and so on of a tuple."""
    found = model(example.clone())
    if isinstance(found, Tensor):
        return ["output"]
    parts = found.items() if isinstance(found, Mapping) else ((f"output_{i}", part) for i, part in enumerate(found))
    names = [(str(name), part) for name, part in parts]
    if not all(isinstance(part, Tensor) for _, part in names):
        return []
    return ["output_input" if name == "input" else name for name, _ in names]  # the input has that name


def _write_onnx(model: nn.Module, path: Path, example: Tensor, about: About) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export: ONNX needs {' and '.join(missing)}: pip install 'gatedconv[export]'")
    names = {0: "batch", 2: "height", 3: "width"}

    outputs = _output_names(model, example)

    def write(dims: tuple[int, ...]) -> Any:
        return torch.onnx.export(
            model,
            (example.clone(),),
            input_names=["input"],
            output_names=outputs,
            opset_version=ONNX_OPSET,
            dynamic_shapes=({dim: torch.export.Dim(names[dim]) for dim in dims},),
            dynamo=True,
            verbose=False,
        )

    _dynamic(write).save(str(path), external_data=False)


def _write_plan(model: nn.Module, path: Path, example: Tensor, about: About) -> None:
    engine_hooks().write_plan(model, path, example, about)


_WRITERS: Mapping[str, Callable[[nn.Module, Path, Tensor, About], None]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "aoti": _write_aoti,
    "plan": _write_plan,
}
