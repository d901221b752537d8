"""The engine: a compact network packed into a native plan."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatedconv._io import first_line
from gatedconv.convert import ConversionError, require_same
from gatedconv.convert.example import does_not_run
from gatedconv.convert.verify import Inputs, as_inputs, run_seeded
from gatedconv.deploy.compact import compact
from gatedconv.engine.choose import choose_estimated
from gatedconv.engine.cpu_plan import PlanModule
from gatedconv.engine.cuda.cuda_plan import CudaPlan
from gatedconv.engine.describe import describe_body
from gatedconv.engine.fuse import fuse
from gatedconv.engine.layers import Layer, runs_on_cuda
from gatedconv.engine.locate import first_wrong_layer
from gatedconv.engine.lower import lower
from gatedconv.engine.partition import Segment, find_segments
from gatedconv.engine.plan_writer import lay_out, write_program
from gatedconv.engine.time_on_cpu import choose_measured
from gatedconv.gating import copied, find_gates, require_frozen, unwrap
from gatedconv.ops.plan import plan_isa, unavailable


class Engine(nn.Module):
    """A frozen or compact network, packed once and run natively, eval.

    On the CPU it computes in float32, or its products in bfloat16; on CUDA in the model's float32, float16 or bfloat16,
    each layer by the algorithm measured fastest, as one CUDA graph for each input shape.

    What no plan can run (see `describe`) runs in PyTorch, in between. The model is written as a graph, from runs of its
    code on random images of several sizes. A model that cannot be written so runs in PyTorch as a whole. If its code
    depends on the size of the images, the graph may hold for the example's size alone; others then run in PyTorch. The
    result equals the model's up to rounding: max|a - b| / max|b| <= 1e-5 in float32, more only where the network itself
    amplifies rounding (the check refuses from 1e-4 on), in other types at most twice PyTorch's own error against
    float32.

    Args:
        model: A frozen, compact or plain model; a frozen one is compacted first. It is copied, and not changed.
        example_input: (N, C, H, W): a size that the model accepts. Any other batch, height and width that the
            model accepts may follow, on the CPU up to 2^18 pixels a side; the algorithms are chosen for this one.
        threads: Threads that a plan runs on, on the CPU; None for as many as PyTorch uses at the time of the call.
        verify: On the CPU, compare the result with the model's on the example, a larger batch and, where the model
            takes them, larger images, before the engine is returned; costs three forwards of each. Where they differ
            by more than rounding, everything runs in PyTorch, which is right but slower, and a warning names the first
            layer that a plan computes otherwise.
        tune: On the CPU, time every algorithm for a 3x3 convolution where estimates choose otherwise. The choices are
            kept in the folder of GATEDCONV_CACHE (default ~/.cache/gatedconv), a file for each CPU, number of threads
            and version of the kernels. (On CUDA they always are.)
        dtype: Of the products of dense convolutions and linear layers. On the CPU torch.bfloat16 rounds their weights
            and inputs and sums in float32; the engine's inputs, outputs and all else stay float32. That is fast on
            a CPU with AMX, faster than float32 for most layers with AVX512_BF16 on AMD, and slower elsewhere. None: the
            model's own.

    Shape: (N, C, H, W), any strides, N >= 0 -> whatever the model returns.

    Raises:
        TypeError: `model` is no module, `example_input` no dense tensor of the model's dtype, or `dtype` no dtype.
        ValueError: `example_input` has another rank or device, the model does not run on it or has gates that are not
            frozen, `threads` is below 1, or nothing computes in `dtype`.
    """

    hides_layers = True  # from what counts their operations

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        *,
        threads: int | None = None,
        verify: bool = True,
        tune: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Engine: the model must be a torch.nn.Module, got {type(model).__name__}")
        if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool)):
            raise TypeError(f"Engine: threads must be an int or None, got {type(threads).__name__}")
        if threads is not None and threads < 1:
            raise ValueError(f"Engine: threads must be at least 1, got {threads}")
        self.threads, self.tune = threads, tune
        self.verify = False  # of copies: those that the check below makes of this engine are not checked in turn
        model = unwrap(model)
        own, device = _kind(model)
        self.products = _products(dtype, own, device)
        _check_input(example_input, "example_input", None, own, device)
        require_frozen(model, "Engine")
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            source = compact(model, example_input) if find_gates(model) else copied(model)
            source.eval()
            source.requires_grad_(False)
            # Kept out of the submodules: it is what save and pickle keep, and what runs is packed from it.
            self.__dict__["source"] = source
            self.example_size = tuple(example_input.shape)
            self.dtype, self.device = own, device
            self.reason = _why_not(source)
            self.fixed_size: tuple[int, ...] | None = None  # (C, H, W) that alone does not run as a whole in PyTorch
            self.body: nn.Module = source
            measured = tune and device.type == "cpu" and self.products == torch.float32
            self.choose = choose_measured(threads or 0) if measured else choose_estimated
            if self.reason is None:
                self._build(source, example_input)
            if verify and self.reason is None and device.type == "cpu":
                self._verify(source, example_input)
        self.verify = verify
        self.eval()

    def _build(self, source: nn.Module, example_input: Tensor) -> None:
        # Shapes are worked out, and weights read, in float32 on the CPU, whatever they are to run in.
        plain = copy.deepcopy(source).to("cpu", torch.float32) if self.device.type == "cuda" else source
        try:
            traced = lower(plain, example_input)
        except Exception as error:  # of the model's own code, which may raise anything
            _require_running(source, example_input)
            self.reason = f"the model cannot be written as a graph: {first_line(error)}"
            return
        self.fixed_size = vars(traced)["fixed_size"]
        calls: dict[fx.Node, fx.Node] = {}  # the result of a segment -> the call that makes it now
        on_cpu = self.device.type == "cpu"
        segments = find_segments(traced) if on_cpu else find_segments(traced, runs_on_cuda)
        for i, segment in enumerate(segments):
            name = f"plan{i}"
            layers = fuse(segment.layers, segment.result, change_inputs=on_cpu)
            traced.add_submodule(name, self._plan(segment, layers, example_input.shape[0]))
            with traced.graph.inserting_after(segment.nodes[-1]):
                call = traced.graph.call_module(name, (calls.get(segment.source, segment.source),))
            calls[segment.result] = call
            segment.result.replace_all_uses_with(call)
            for node in reversed(segment.nodes):
                traced.graph.erase_node(node)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        traced.delete_all_unused_submodules()
        self.body = traced.to(self.device, self.dtype) if self.device.type == "cuda" else traced

    def _plan(self, segment: Segment, layers: list[Layer], batch: int) -> nn.Module:
        ends = segment.source, layers, segment.result, batch
        if self.device.type == "cuda":
            return CudaPlan(*lay_out(*ends, lambda *_: "conv"), self.dtype, self.device)
        return PlanModule(write_program(*ends, self.choose, self.products), self.threads or 0)

    def _verify(self, source: nn.Module, example: Tensor) -> None:
        """Run everything in PyTorch, with a warning, if a result is not the model's."""

        def locate(source: nn.Module, _: nn.Module, inputs: Inputs) -> str:
            options: dict[str, Any] = {"example": example, "choose": self.choose, "dtype": self.products}
            return first_wrong_layer(source, self.body, inputs, **options)

        try:
            require_same(
                source, self, example, "the plan", locate=locate, integers=False, precision=self.products, copies=False
            )
        except ConversionError as error:
            self.reason, self.fixed_size = str(error), None
            self.body = source
            warnings.warn(f"Engine: everything runs in PyTorch, because of {self.reason}", stacklevel=3)

    @property
    def plans(self) -> list[PlanModule | CudaPlan]:
        """The packed segments, in order."""
        return [module for module in self.body.modules() if isinstance(module, (PlanModule, CudaPlan))]

    def forward(self, x: Tensor) -> Any:
        """Compute the model's output.

        Raises:
            TypeError: `x` is no dense tensor of the model's dtype.
            ValueError: `x` has another rank, device or number of channels, or is too small, or too large for
                the plans or the memory.
        """
        _check_input(x, "input", self.example_size[1], self.dtype, self.device)
        written = self.fixed_size in (None, tuple(x.shape[1:]))
        run: Callable[[Tensor], Any] = self.body if written else self._run_source
        if torch.is_autocast_enabled(self.device.type):
            # Plans are float32; what PyTorch computes between them has to be, too.
            with torch.autocast(self.device.type, enabled=False):
                return run(x.detach())
        return run(x.detach())

    def _run_source(self, x: Tensor) -> Any:
        """The model itself, of a size that the body is not written for."""
        source: nn.Module = self.__dict__["source"]
        try:
            return source(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(f"Engine: the model does not take {_by(x.shape[1:])}: {first_line(error)}") from error

    def describe(self) -> str:
        """Report what runs where: layers, kernels, MACs, bytes, instruction set, workspace."""
        if self.reason is not None:
            return f"Everything runs in PyTorch: {self.reason}."
        threads = self.threads or torch.get_num_threads()
        if self.device.type == "cpu":
            bf16 = f" (bf16: {plan_isa(bf16=True)})" if self.products == torch.bfloat16 else ""
            machine = f"native kernels: {plan_isa()}{bf16}, {threads} threads"
        else:
            modes = {plan.mode for plan in self.plans if isinstance(plan, CudaPlan)}
            machine = f"{self.device}, {self.dtype}, GATEDCONV_CUDA_KERNELS: {', '.join(sorted(modes)) or 'no plan'}"
        more = [f"Inputs of other sizes than {_by(self.fixed_size)} run in PyTorch."] if self.fixed_size else []
        assert isinstance(self.body, fx.GraphModule)
        lines = describe_body(self.body, self.example_size[0], threads)
        return "\n".join([f"Engine for inputs of {_by(self.example_size)}; {machine}.", *more, *lines])

    def train(self, mode: bool = True) -> Engine:
        """Stay in eval: a packed network cannot be trained."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Engine:
        """Stay on the device and in the dtype that everything was packed for."""
        there = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if there.dtype != self.dtype or there.device != self.device:
            raise TypeError(
                f"Engine: it is packed for {self.dtype} on {self.device} and cannot become {there.dtype} on "
                f"{there.device}; build a new Engine from the converted model"
            )
        super()._apply(fn, recurse)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return pack_anew, (self.source, self.example_size, self.products, self.threads, self.tune, self.verify)


def _by(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def pack_anew(
    source: nn.Module,
    size: Sequence[int],
    dtype: torch.dtype,
    threads: int | None = None,
    tune: bool = False,
    verify: bool = True,
) -> Engine:
    """Build an engine again after a copy, a pickle or a load: packed and verified on this machine.

    Args:
        source: what runs.
        size: (N, C, H, W) of the example; its numbers are random, the same at every call.
        dtype: as in `Engine`, like those that follow.
        threads: see dtype.
        tune: see dtype.
        verify: see dtype.
    """
    own, device = _kind(source)
    example = torch.rand(tuple(size), generator=torch.Generator().manual_seed(0), device="cpu").to(device, own)
    return Engine(source, example, threads=threads, tune=tune, verify=verify, dtype=dtype)


def _products(dtype: torch.dtype | None, own: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products are to be computed in, of a model in its own dtype."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"Engine: dtype must be a torch.dtype or None, got {type(dtype).__name__}")
    if dtype is None or dtype == own or (dtype, own, device.type) == (torch.bfloat16, torch.float32, "cpu"):
        return dtype or own
    more = " or torch.bfloat16" if (own, device.type) == (torch.float32, "cpu") else ""
    raise ValueError(f"Engine: dtype must be {own}{more} for a model in {own} on {device}, got {dtype}")


def _require_running(model: nn.Module, example_input: Tensor) -> None:
    """Raise ValueError where the model itself does not run on the example."""
    inputs = as_inputs(example_input)
    try:
        run_seeded(model, inputs)
    except Exception as error:  # whatever the model's code raises
        raise does_not_run(model, inputs, error, "Engine") from error


def _kind(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device of a model's inputs: those of its first floating point tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.float32, torch.device("cpu")


def _why_not(model: nn.Module) -> str | None:
    """Return the reason why no plan can be made of a model, None if one can."""
    dtype, device = _kind(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != device:
            return f"{name} is on {tensor.device}, other tensors on {device}"
        if device.type not in ("cpu", "cuda"):
            return f"{name} is on {tensor.device}, and plans run on CPU and CUDA"
        if not tensor.is_floating_point():
            continue
        if device.type == "cpu" and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, and plans on the CPU compute in float32"
        if tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, other tensors {dtype}"
    if device.type == "cuda":
        types = (torch.float16, torch.bfloat16, torch.float32)
        return None if dtype in types else f"plans on CUDA compute in float16, bfloat16 or float32, not in {dtype}"
    return unavailable()


def _check_input(x: Tensor, what: str, channels: int | None, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"Engine: {what} must be a tensor (N, C, H, W), got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"Engine: {what} must be a dense tensor (torch.strided), got {x.layout}")
    if x.dtype != dtype:
        raise TypeError(f"Engine: {what} must have the model's dtype {dtype}, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"Engine: {what} must be (N, C, H, W), got shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"Engine: {what} must be on the model's device {device}, got {x.device}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"Engine: {what} must have {channels} channels, got shape {tuple(x.shape)}")
