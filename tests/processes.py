"""Processes of tests: forked from one that has everything imported and has trained nothing, so that they begin at once.

What has trained cannot be forked, and one that imports everything takes seconds.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

SERVER = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else None)
if SERVER.get_start_method() == "forkserver":
    SERVER.set_forkserver_preload(["tests.imported"])


def run_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in two processes, ranks 0 and 1; raise what one of them raises."""
    mp.start_processes(function, arguments, nprocs=2, start_method=SERVER.get_start_method())
