"""The `gatedconv` command: one module per subcommand, imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = {
    "train": "train a network with gates, freeze it, cut it, measure it",
    "eval": "top-1, MACs and parameters of a run or a saved model",
    "freeze": "freeze and cut a run from its newest checkpoint",
    "export": "write a cut network for ONNX Runtime, torch.export or AOTInductor",
    "bench": "latency of a network, dense against cut",
    "report": "plots and tables of runs",
    "env": "versions, devices and native libraries of this installation",
}
USER_ERROR = 2
INTERRUPTED = 130
TRACEBACK_VARIABLE = "GATEDCONV_TRACEBACK"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and leave with exit code 2."""
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 2: the user asked for something that cannot be, told in one line on stderr. 3: a run reached
    its time limit, or got SIGTERM, and can be resumed. 130: interrupted.

    Args:
        arguments: without the program's name; default: those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] not in COMMANDS:
            return _top_level(arguments)
        name, *rest = arguments
        command = importlib.import_module(f"gatedconv.cli.{name}")
        parser = Parser(prog=f"gatedconv {name}", description=COMMANDS[name])
        command.add_arguments(parser)
        code: int = command.run(parser.parse_args(rest))
        return code
    except SystemExit as leaving:  # argparse: --help, or an error that it has told already
        return leaving.code if isinstance(leaving.code, int) else USER_ERROR
    except KeyboardInterrupt as stop:  # a command may bring words of its own
        return _tell(arguments, str(stop) or "interrupted", INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        return _tell_error(arguments, error, str(error) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return _tell_error(arguments, error, "out of memory: " + str(error).partition("\n")[0])


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocator gave up; PyTorch's for the CPU has no exception class of its own."""
    from torch import OutOfMemoryError

    signs = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, (MemoryError, OutOfMemoryError)) or any(sign in str(error) for sign in signs)


def _tell_error(arguments: list[str], error: Exception, message: str) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    return _tell(arguments, f"{message} ({TRACEBACK_VARIABLE}=1 shows where)", USER_ERROR)


def _top_level(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="gatedconv",
        usage="gatedconv COMMAND [options]",
        description="Train once with gates, ship the part that matters.",
        epilog=f"commands:\n{listing}\n\ngatedconv COMMAND --help tells the options of a command.",
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


def _tell(arguments: list[str], message: str, code: int) -> int:
    """One line on stderr, whatever line breaks the message had."""
    command = " ".join(["gatedconv", *arguments[:1]])
    print(f"{command}: {'error: ' if code == USER_ERROR else ''}{' '.join(message.split())}", file=sys.stderr)
    return code
