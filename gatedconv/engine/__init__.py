"""A cut network, packed once and run natively."""

from gatedconv.deploy.serialize import register_packed
from gatedconv.engine.engine import Engine

register_packed(Engine, lambda engine: (engine.source, list(engine.example_size)), Engine)

__all__ = ["Engine"]
