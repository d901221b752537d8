"""``make gpu``: what needs a GPU, in stages that each end within nine minutes."""
