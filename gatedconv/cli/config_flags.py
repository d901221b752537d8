"""Every field of `TrainConfig` as a flag; precedence: preset < config file < flag."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatedconv.train.config import TrainConfig, field_specs, make_config, read_toml
from gatedconv.train.options import field_type
from gatedconv.train.presets import preset_settings

_PREFIX = "config_"


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--batch-size N`, `--nesterov/--no-nesterov` and so on; without a default."""
    group = parser.add_argument_group("settings (defaults in brackets; presets change them)")
    for name, spec in field_specs().items():
        flag = f"--{name.replace('_', '-')}"
        kind = field_type(spec)
        shared: dict[str, Any] = {"dest": _PREFIX + name, "default": argparse.SUPPRESS}
        help_text = f"{spec.metadata['help']} [{_shown(spec.default)}]".replace("%", "%%")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text, **shared)
        elif kind is tuple:
            group.add_argument(flag, nargs="*", type=float, metavar="F", help=help_text, **shared)
        else:
            choices = spec.metadata["choices"]
            metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X", str: "TEXT"}[kind]
            group.add_argument(flag, type=kind, metavar=metavar, help=help_text, **shared)


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields given on the command line."""
    given = {key: value for key, value in vars(arguments).items() if key.startswith(_PREFIX)}
    return {
        key.removeprefix(_PREFIX): tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }


def merge_settings(preset: str | None, file: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Build the config of a run: defaults, then the preset, then the file, then the flags.

    Raises:
        ValueError, TypeError: an unknown preset or field, an unreadable file, a value that is not allowed.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        settings |= preset_settings(preset)
    if file is not None:
        values = read_toml(file)
        make_config(values, where=str(file))  # so that an error names the file
        settings |= values
    return make_config(settings | dict(flags))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{element:g}" for element in value)
    return "off" if value is False else "on" if value is True else str(value) or "none"
