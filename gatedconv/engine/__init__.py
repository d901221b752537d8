"""The inference engine: a cut network as one native plan."""

from gatedconv.engine.engine import Engine

__all__ = ["Engine"]
