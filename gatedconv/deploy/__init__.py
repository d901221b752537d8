"""From a trained model to a smaller one: freeze, compact, save, load, export."""

from gatedconv.deploy.compact import compact
from gatedconv.deploy.export import export
from gatedconv.deploy.freeze import Consensus, freeze
from gatedconv.deploy.serialize import load, save

__all__ = ["Consensus", "compact", "export", "freeze", "load", "save"]
