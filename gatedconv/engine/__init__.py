"""A compact network, packed once and run natively.

lower.py, idioms.py: the network as a graph of values with their shapes (deploy/graph.py writes it). read_layer.py,
read_arithmetic.py, read_pool.py, fuse.py: its layers (layers.py). partition.py: what runs natively, and what PyTorch
runs between. choose.py, tuner.py, time_on_cpu.py: the algorithm of each layer. maps.py, plan_writer.py, pack.py: the
places of maps, instructions and packed weights, which csrc/cpu runs; cpu_plan.py calls it. cuda/: plans of GPUs.
describe.py: what runs where. plan_file.py: a plan as a file. locate.py: the first wrong layer.
"""

from gatedconv.deploy.engine_hooks import EngineHooks, register_engine
from gatedconv.engine.engine import Engine, pack_anew
from gatedconv.engine.plan_file import write_plan

register_engine(
    EngineHooks(
        kind=Engine,
        unpack=lambda engine: (engine.source, list(engine.example_size), engine.products),
        pack=pack_anew,
        write_plan=write_plan,
    )
)

__all__ = ["Engine"]
