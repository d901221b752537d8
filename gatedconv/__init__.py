"""Train a network with gated layers and channels once, freeze what the gates agree on, cut the rest out."""

__version__ = "0.1.0"
