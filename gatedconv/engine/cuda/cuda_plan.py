"""A segment of a network on a GPU: its instructions, each computed by the candidate that was fastest there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedconv.engine.cuda import resident
from gatedconv.engine.cuda.candidates import Candidate, activate, conv_candidates
from gatedconv.engine.cuda.captured import GraphCache
from gatedconv.engine.cuda.instructions import Instruction, make_instructions, map_sizes, padded
from gatedconv.engine.cuda.resident import ResidentLaunch
from gatedconv.engine.cuda.resident_runs import ResidentRun, find_runs
from gatedconv.engine.cuda.time_on_gpu import tuner_for
from gatedconv.engine.maps import Map, Step
from gatedconv.engine.tuner import Tuner
from gatedconv.ops._masked_conv2d_cuda import allows_tf32, kernels_mode
from gatedconv.ops.plan import plan_output_size

Pick = Callable[[int, Tensor, Tensor | None], Candidate]  # instruction, source, residual -> how to compute it


class CudaPlan(nn.Module):
    """A segment of a network as a GPU runs it: (N, C, H, W) -> (N, C', H', W') or (N, C'), contiguous.

    For every input shape the candidates for each convolution are measured once (`Tuner`); with mode "experimental"
    also, for each run of layers whose maps fit into shared memory, one launch against those layers one by one. Then
    the segment is captured in a CUDA graph. Maps are channels last in memory, padded to 16 bytes, zeros in the padding.

    Args:
        steps: Of `lay_out`.
        maps: Of `lay_out`.
        shape: How the output's size follows from the input's.
        dtype: float16, bfloat16 or float32.
        device: Where it runs; anything but CUDA runs the same instructions by PyTorch and without graphs.
        mode: See `kernels_mode`; None reads the environment.
        tuner: None for the device's own.
    """

    def __init__(
        self,
        steps: list[Step],
        maps: list[Map],
        shape: list[int],
        dtype: torch.dtype,
        device: torch.device,
        mode: str | None = None,
        tuner: Tuner | None = None,
    ) -> None:
        super().__init__()
        self.maps, self.shape, self.dtype, self.device = maps, shape, dtype, device
        self.mode = kernels_mode() if mode is None else mode
        self.first, self.last = steps[0].target, steps[-1].source
        self.instructions = make_instructions(steps, maps)
        self.tuner = tuner
        # Input shape -> candidate for every instruction, "" for no choice; runs of one launch, by their first.
        self.chosen: dict[tuple[int, ...], list[str]] = {}
        self.runs: dict[tuple[int, ...], dict[int, tuple[ResidentRun, str]]] = {}
        self._limits: resident.Limits | None = None
        self._built: dict[tuple[int, str], Candidate] = {}
        self._launches: dict[tuple[int, str, int, int], ResidentLaunch] = {}
        # A graph that is being captured can take nothing from the host.
        self._lists = {
            at: torch.tensor(one.index, dtype=torch.int64, device=device)
            for at, one in enumerate(self.instructions)
            if one.index
        }
        self._graphs = GraphCache(self.run)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CudaPlan:
        """Stay: a plan is packed for its device and dtype."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Run the plan: by its graph, or inside of the graph that the caller is capturing."""
        plan_output_size(x.shape, self.shape)  # raises for an input that is too small
        if x.shape[0] == 0:
            return x.new_empty(plan_output_size(x.shape, self.shape))
        if self.device.type != "cuda":
            self.tune(x)
            return self.run(x)
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                if tuple(x.shape) not in self.chosen:
                    raise RuntimeError(
                        f"Engine: an input of shape {tuple(x.shape)} while a CUDA graph is captured; "
                        "expected a shape that the engine was called with before, call it once with this one first"
                    )
                return self.run(x)
            self.tune(x)
            return self._graphs(x)

    @torch.no_grad()
    def tune(self, x: Tensor) -> None:
        """Choose the candidates for inputs of this shape, unless that is done."""
        shape = tuple(x.shape)
        if shape in self.chosen:
            return
        tuner = self.tuner
        if tuner is None and self.device.type == "cuda":
            tuner = tuner_for(self.device)
        chosen = [""] * len(self.instructions)

        def pick(at: int, source: Tensor, residual: Tensor | None) -> Candidate:
            one = self.instructions[at]
            candidates = conv_candidates(one, self.dtype, self.device, self.mode)
            chosen[at] = next(iter(candidates))
            if tuner is not None:
                trials = {name: _trial(build, source, residual) for name, build in candidates.items()}
                key = _key(one, source, self.mode)
                # "on": ours wherever there is one, whatever is faster.
                chosen[at] = tuner.choose(key, trials, "gatedconv" if self.mode == "on" else "")
            return self._candidate(at, chosen[at])

        runs = self._find_runs(x) if tuner is not None else []
        sources = dict.fromkeys((run.start for run in runs), x)
        self._execute(x, pick, {}, sources)
        if tuner is not None:
            self.runs[shape] = self._choose_runs(runs, sources, chosen, tuner)
        self.chosen[shape] = chosen

    def _find_runs(self, x: Tensor) -> list[ResidentRun]:
        """The runs of layers that one launch could compute for inputs of this size."""
        if self.mode == "experimental":
            self._limits = resident.limits(self.device, self.dtype)
        if self._limits is None:
            return []
        sizes = map_sizes(self.instructions, self.first, (x.shape[2], x.shape[3]))
        return find_runs(self.instructions, sizes, self.last, self.dtype, self._limits.shared_bytes)

    def _choose_runs(
        self, runs: list[ResidentRun], sources: dict[int, Tensor], chosen: list[str], tuner: Tuner
    ) -> dict[int, tuple[ResidentRun, str]]:
        """Measure each run's layers one by one, by the candidates chosen, against one launch; keep those that gain."""
        launches = [f"resident x{ranks}" for ranks in self._limits.ranks] if self._limits is not None else []
        gains: dict[int, tuple[ResidentRun, str]] = {}
        for run in runs:
            builds = {"layers": partial(self._layers, run, chosen)}
            builds |= {name: partial(self._resident, run, name) for name in launches}
            # Layers may work in place: they are given a copy.
            trials = {name: _trial(build, sources[run.start], None, spoils=True) for name, build in builds.items()}
            keys = [_key(one, sources[run.start], self.mode) for one in self.instructions[run.start : run.end]]
            digest = hashlib.sha256(f"{self._limits} {keys}".encode()).hexdigest()[:16]
            name = tuner.choose(f"run of {len(keys)} {digest}", trials)
            if name != "layers":
                gains[run.start] = (run, name)
        return gains

    def _layers(self, run: ResidentRun, chosen: list[str]) -> Candidate:
        def compute(source: Tensor, _: Tensor | None) -> Tensor:
            maps = {run.source: source}
            for at in range(run.start, run.end):
                self._step(at, maps, lambda at, *_: self._candidate(at, chosen[at]))
            return maps[run.result]

        return compute

    def _resident(self, run: ResidentRun, name: str) -> Candidate:
        first = run.maps[run.source]
        key = (run.start, name, first.height, first.width)
        if key not in self._launches:
            if self._limits is None:
                raise RuntimeError("the resident driver no longer supports this device and dtype")
            ranks = int(name.rpartition("x")[2])
            self._launches[key] = ResidentLaunch(run, self.dtype, self.device, ranks, self._limits.shared_bytes)
        return self._launches[key]

    def _candidate(self, at: int, name: str) -> Candidate:
        if (at, name) not in self._built:
            self._built[at, name] = conv_candidates(self.instructions[at], self.dtype, self.device, self.mode)[name]()
        return self._built[at, name]

    @torch.no_grad()
    def run(self, x: Tensor) -> Tensor:
        """Run the instructions one by one on the current stream, by the candidates chosen for this shape."""
        chosen = self.chosen.get(tuple(x.shape))
        runs = self.runs.get(tuple(x.shape), {})
        return self._execute(x, lambda at, *_: self._candidate(at, chosen[at] if chosen else "cudnn"), runs, {})

    def _execute(
        self, x: Tensor, pick: Pick, runs: dict[int, tuple[ResidentRun, str]], sources: dict[int, Tensor]
    ) -> Tensor:
        """Run everything; at the positions in `sources` the map that is read there is copied into it."""
        maps = {self.first: self._enter(x)}
        at = 0
        while at < len(self.instructions):
            if at in sources:
                sources[at] = maps[self.instructions[at].source].clone(memory_format=torch.preserve_format)
            if at in runs:
                run, name = runs[at]
                maps[run.result] = self._resident(run, name)(maps[run.source], None)
                for dead in {i for one in self.instructions[run.start : run.end] for i in one.dead} & set(maps):
                    del maps[dead]
                at = run.end
            else:
                self._step(at, maps, pick)
                at += 1
        out = maps[self.last][:, : self.shape[0]]
        return (out.flatten(1) if self.shape[1] == 2 else out).contiguous(memory_format=torch.contiguous_format)

    def _step(self, at: int, maps: dict[int, Tensor], pick: Pick) -> None:
        """Run one instruction; maps are freed after their last read."""
        one = self.instructions[at]
        source = maps[one.source]
        residual = maps[one.residual] if one.residual >= 0 else None
        if one.op == "conv":
            maps[one.target] = pick(at, source, residual)(source, residual)
        else:
            maps[one.target] = self._simple(at, source, residual)
        del source, residual
        for dead in one.dead:
            del maps[dead]

    def _enter(self, x: Tensor) -> Tensor:
        """Return x (N, C, H, W) as a map: channels last, zeros in the padding."""
        size = (x.shape[0], padded(x.shape[1], self.dtype), *x.shape[2:])
        entered = torch.empty(size, dtype=self.dtype, device=x.device, memory_format=torch.channels_last)
        if size[1] > x.shape[1]:
            entered.zero_()  # all of it: contiguous, where the padding alone is strided
        entered[:, : x.shape[1]].copy_(x)
        return entered

    def _simple(self, at: int, x: Tensor, residual: Tensor | None) -> Tensor:
        """Run an instruction that is no convolution in PyTorch."""
        one = self.instructions[at]
        top, left = one.padding[:2]
        channels = padded(one.channels[1], self.dtype)
        if one.op == "max_pool":
            out = F.max_pool2d(x, one.kernel, one.stride, (top, left))
        elif one.op == "avg_pool":
            out = F.avg_pool2d(x, one.kernel, one.stride, (top, left), count_include_pad=one.counts_padding)
        elif one.op == "mean_pool":
            out = x.mean((2, 3), keepdim=True)
        elif one.op == "gather":
            out = F.pad(x.index_select(1, self._lists[at]), (0, 0, 0, 0, 0, channels - len(one.index)))
        elif one.op == "subsample":
            thin = x[:, : one.channels[0], :: one.stride[0], :: one.stride[1]]
            behind = channels - one.offset - one.channels[0]
            out = F.pad(thin, (0, 0, 0, 0, one.offset, behind))
        else:
            assert residual is not None
            if one.op == "scatter_add":
                out = residual.index_add(1, self._lists[at], x[:, : len(one.index)])
            else:
                out = residual + x
        return activate(out, one.act).contiguous(memory_format=torch.channels_last)


def _trial(
    build: Callable[[], Candidate], source: Tensor, residual: Tensor | None, spoils: bool = False
) -> Callable[[], Callable[[], Tensor]]:
    """A call to be timed. One that works in place overwrites its own copy of the residual: its first result is right.

    With `spoils` it overwrites a copy of the source, too.
    """

    def make() -> Callable[[], Tensor]:
        candidate = build()
        own = None if residual is None else residual.clone(memory_format=torch.preserve_format)
        given = source.clone(memory_format=torch.preserve_format) if spoils else source
        return lambda: candidate(given, own)

    return make


def _key(one: Instruction, source: Tensor, mode: str) -> str:
    """All that the time of a convolution depends on, on one device."""
    weight = tuple(one.weight.shape) if one.weight is not None else ()
    lists = [None if index is None else len(index) for index in (one.in_index, one.out_index)]
    size = "x".join(map(str, source.shape))
    precision = "tf32" if source.dtype == torch.float32 and allows_tf32() else str(source.dtype).removeprefix("torch.")
    parts = [size, weight, one.channels, one.stride, one.padding, one.dilation, one.groups, lists, one.residual >= 0]
    return f"{mode} {precision} {' '.join(map(str, parts))} {one.act} {one.keeps_closed and one.in_place}"
