"""A compact network, packed once and run natively."""

from gatedconv.deploy.export import register_plan_writer
from gatedconv.deploy.serialize import register_packed
from gatedconv.engine.engine import Engine
from gatedconv.engine.plan_file import write_plan

register_plan_writer(write_plan)
register_packed(
    Engine,
    lambda engine: (engine.source, list(engine.example_size), engine.products),
    lambda model, example, dtype: Engine(model, example, dtype=dtype),
)

__all__ = ["Engine"]
