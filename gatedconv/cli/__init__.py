"""The `gatedconv` command: one module per subcommand, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

COMMANDS = {
    "train": "train a gated network, freeze it, compact it, measure it",
    "eval": "top-1, MACs and parameters of a run or a saved model",
    "freeze": "freeze and compact a run from its latest checkpoint",
    "export": "export a compact network for ONNX Runtime, PyTorch or the runtime without PyTorch",
    "bench": "latency of a network in our engine and in other runtimes",
    "report": "plots and tables of runs",
    "report html": "one self-contained HTML page about runs",
    "env": "versions, devices and native libraries of this installation",
}
USER_ERROR = 2
INTERRUPTED = 130
TRACEBACK_VARIABLE = "GATEDCONV_TRACEBACK"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `run_command`.

    Args:
        arguments: without the program's name; default: those of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = 2 if " ".join(given[:2]) in COMMANDS else 1
    name, rest = " ".join(given[:words]), given[words:]

    def call() -> int:
        if name not in COMMANDS:
            return _top_level(given)
        command = importlib.import_module(f"gatedconv.cli.{name.replace(' ', '_')}")
        parser = Parser(prog=f"gatedconv {name}", description=COMMANDS[name])
        command.add_arguments(parser)
        code: int = command.run(parser.parse_args(rest))
        return code

    return run_command(f"gatedconv {name}".strip(), call)


def run_command(name: str, call: Callable[[], int]) -> int:
    """Call a command and report its errors in one line on stderr.

    Args:
        name: of the command, for the line.
        call: returns the exit code.

    Returns:
        0 when done; 2 for a user error; 3 when a run reached its time limit, or got SIGTERM, and can be resumed; 130
        when interrupted.
    """
    try:
        return call()
    except SystemExit as leaving:  # argparse: --help, or an error that it has printed
        return leaving.code if isinstance(leaving.code, int) else USER_ERROR
    except KeyboardInterrupt as stop:  # a command may give it a message
        return _print_line(name, str(stop) or "interrupted", INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        return _print_error(name, error, str(error) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _print_error(name, error, "out of memory: " + str(error).partition("\n")[0])


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; PyTorch's CPU allocator has no exception class of its own."""
    from torch import OutOfMemoryError

    signs = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, (MemoryError, OutOfMemoryError)) or any(sign in str(error) for sign in signs)


def _print_error(name: str, error: Exception, message: str) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    return _print_line(name, f"{message} ({TRACEBACK_VARIABLE}=1 shows the traceback)", USER_ERROR)


def _print_line(name: str, message: str, code: int) -> int:
    print(f"{name}: {'error: ' if code == USER_ERROR else ''}{' '.join(message.split())}", file=sys.stderr)
    return code


def _top_level(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="gatedconv",
        usage="gatedconv COMMAND [options]",
        description="Train once with gates, ship the part that matters.",
        epilog=f"commands:\n{listing}\n\ngatedconv COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.version:
        from importlib.metadata import version

        print(f"gatedconv {version('gatedconv')}")
    elif found.command is None:
        parser.print_help()
    else:
        parser.error(f"unknown command {found.command!r}; expected one of {', '.join(COMMANDS)}")
    return 0
