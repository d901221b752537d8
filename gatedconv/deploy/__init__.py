"""From a trained model to something that runs: freeze, compact, count, save, load, export."""

from gatedconv.deploy.compact import compact
from gatedconv.deploy.engine import Engine
from gatedconv.deploy.export import export
from gatedconv.deploy.freeze import Consensus, freeze
from gatedconv.deploy.macs import count_macs
from gatedconv.deploy.serialize import load, save

__all__ = ["Consensus", "Engine", "compact", "count_macs", "export", "freeze", "load", "save"]
