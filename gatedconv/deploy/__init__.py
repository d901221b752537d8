"""From a trained model to a smaller one: freeze, compact, save, load, export.

freeze.py: the vote, and BatchNorm after it. compact.py, shrink.py, slicing.py: removal of channels; which ones, through
sums and concatenations, convert/channels.py solves. resnet_blocks.py: our own blocks. graph.py, graph_writer.py,
graph_views.py: a model as a graph. serialize.py, graph_format.py, module_changes.py: files. export.py: ONNX,
torch.export, AOTInductor, plan. engine_hooks.py: the engine's part in files. hub.py: the Hugging Face Hub.
"""

from gatedconv.deploy.compact import compact
from gatedconv.deploy.export import export
from gatedconv.deploy.freeze import freeze, re_estimate_batchnorm
from gatedconv.deploy.serialize import load, save

__all__ = ["compact", "export", "freeze", "load", "re_estimate_batchnorm", "save"]
