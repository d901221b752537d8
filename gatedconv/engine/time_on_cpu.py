"""Times the algorithms for a convolution on the CPU of this machine (`Engine(tune=True)`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from gatedconv import _build, _native
from gatedconv.engine.choose import Choose, algorithms, work_of
from gatedconv.engine.layers import Layer, map_size
from gatedconv.engine.plan_writer import write_program
from gatedconv.engine.tuner import Tuner, cache_path
from gatedconv.environment import cpu_info
from gatedconv.ops.plan import plan_isa, plan_run

_EVICT = 2**23  # bytes of copies of a layer's weights: no core's own cache has them when their turn comes again
_CALLS, _SECONDS = 40, 0.05  # limits of one measurement
_ROUNDS = 3  # interleaved: what disturbs an algorithm for a while seldom disturbs all of its rounds

# Of /proc/cpuinfo. Virtual machines give several generations the same name; Arm's have numbers only.
_CPU = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")


def layer_call(layer: Layer, batch: int, algorithm: str, threads: int) -> Callable[[], Tensor]:
    """A plan of one convolution, without what is fused to it, on random images: each call returns the same.

    Its weights come from memory as they do in a network: calls use copies of them one after the other.
    """
    source = layer.inputs[0]
    bare = replace(layer, residual=None, gate=None, before=None)
    program = write_program(source, [bare], layer.output, batch, lambda *_: algorithm)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *map_size(source), generator=random, dtype=torch.float32, device="cpu")
    count = min(64, 1 + math.ceil(_EVICT / program.weights.nbytes))
    copies = cycle([program.weights.clone() for _ in range(count)])
    return lambda: plan_run(x, program.code, next(copies), program.shape, threads)


def least_ms(call: Callable[[], Tensor], clock: Callable[[], float] = time.perf_counter) -> float:
    """The least milliseconds of some calls: other programs only add to it."""
    call()
    best, begun, calls = math.inf, clock(), 0
    while calls < _CALLS and clock() - begun < _SECONDS or calls < 3:
        then = clock()
        call()
        best, calls = min(best, clock() - then), calls + 1
    return 1000 * best


def choose_measured(threads: int) -> Choose:
    """A `Choose` that times every algorithm, once for each size of layer, CPU, number of threads and kernel version.

    Args:
        threads: Of a plan, 0 for as many as PyTorch uses now.
    """
    threads = threads or torch.get_num_threads()
    header: dict[str, Any] = {
        "cpu": " ".join(value for field in _CPU if (value := cpu_info(field))) or "unknown",
        "isa": plan_isa(),
        "threads": threads,
        "sources": _build.source_hash(_native.source_folder()),
    }
    tuner = Tuner(cache_path(header), header, least_ms, _ROUNDS)

    def choose(layer: Layer, batch: int) -> str:
        batch = max(batch, 1)  # an empty batch cannot be timed
        work = work_of(layer, batch)
        key = f"n{batch} i{work.in_channels} o{work.out_channels} h{work.height} w{work.width} k3"
        return tuner.choose(key, {name: partial(layer_call, layer, batch, name, threads) for name in algorithms(layer)})

    return choose
