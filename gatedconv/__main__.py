"""`python -m gatedconv` is the `gatedconv` command."""

from __future__ import annotations

import sys

from gatedconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
