"""`gatedconv env`."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and native libraries."""
    from gatedconv.environment import collect

    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    width = max(len(str(key)) for key in found)
    for key, value in found.items():
        print(f"{key:<{width}}  {value}")
    return 0
