"""What a training run needs from its start to its last file, imported before it begins: minutes later is too late."""

from __future__ import annotations

import importlib
import importlib.util
import sys

# Packages by the name they are imported by; those of fvcore are listed because its own import names only the first
# one that is missing.
PACKAGES = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "portalocker": "portalocker",
    "yacs": "yacs",
    "termcolor": "termcolor",
    "tabulate": "tabulate",
    "tqdm": "tqdm",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "rich": "rich",
    "tomli_w": "tomli-w",
    **({} if sys.version_info >= (3, 11) else {"tomli": "tomli"}),
}
GPU_PACKAGES = {"triton": "triton"}
# What is imported late: by config.toml, the count of MACs, saved models, progress, and the run itself.
MODULES = (
    "tomli_w",
    "fvcore.nn",
    "safetensors.torch",
    "rich.progress",
    "reproduce.runner",
    "gatedconv.cli.progress",
    "gatedconv.cli.report",
    "gatedconv.train.pipeline",
    "reproduce.naive",
)
GPU_MODULES = ("gatedconv.kernels", "gatedconv.kernels.gate")


def require_all(device: str = "cuda") -> None:
    """Import what runs need; on the device "cpu" they need no Triton.

    Raises:
        ImportError: some of it is missing; the message names all packages, and how to bring them.
    """
    on_cpu = device == "cpu"
    packages = PACKAGES | ({} if on_cpu else GPU_PACKAGES)
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(_how_to_bring(missing))
    for name in (*MODULES, *(() if on_cpu else GPU_MODULES)):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ImportError(_how_to_bring([error.name or name])) from None
        except ImportError as error:
            raise ImportError(f"{name} cannot be imported ({error})") from None


def _how_to_bring(packages: list[str]) -> str:
    names = " ".join(packages)
    return (
        f"missing here: {', '.join(packages)}. Where nothing can be installed, bring wheels: on another machine "
        f"`python -m pip wheel --no-deps --wheel-dir wheels {names}`, then here unpack them into one folder "
        "(`python -m pip install --no-index --no-deps --target packages wheels/*.whl`, or unzip) and set "
        "PYTHONPATH=packages"
    )
