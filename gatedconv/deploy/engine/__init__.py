"""The inference engine: a cut network as one native plan."""

from gatedconv.deploy.engine.engine import Engine

__all__ = ["Engine"]
