"""`python -m gatedconv_runtime NET.plan [IMAGE ...]`: the top classes of images, or without images what would run."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from gatedconv_runtime import Plan, PlanError, __version__, file_version, load
from gatedconv_runtime.image import prepare, read_image


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m gatedconv_runtime", description=__doc__.split(": ", 1)[1])
    version = f"gatedconv-runtime {__version__}, plans of version {file_version()}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("plan", metavar="NET.plan")
    parser.add_argument("images", metavar="IMAGE", nargs="*")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to print [5]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one for each core")
    options = parser.parse_args(arguments)
    try:
        plan = load(options.plan, threads=options.threads)
        if not options.images:
            print(plan.describe())
        for path in options.images:
            if len(options.images) > 1:
                print(path)
            _print_classes(plan, plan(prepare(read_image(path), plan)), options.top)
    except (ValueError, OSError) as error:
        print(f"gatedconv_runtime: {error}", file=sys.stderr)
        return 2
    return 0


def _print_classes(plan: Plan, output: np.ndarray, top: int) -> None:
    if output.ndim != 2:
        raise PlanError(f"the output is no vector of classes: its shape is {output.shape}")
    scores = np.exp(output[0] - output[0].max())
    scores /= scores.sum()
    names = plan.classes or tuple(map(str, range(len(scores))))
    for i in np.argsort(-scores)[: max(top, 1)]:
        print(f"{100 * scores[i]:6.2f} %  {names[i]}")


if __name__ == "__main__":
    sys.exit(main())
