"""The general cut: any frozen graph without its closed part."""

from gatedconv.deploy.cut.graph import cut_graph

__all__ = ["cut_graph"]
