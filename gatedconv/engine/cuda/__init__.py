"""Plans on a GPU: instructions, candidates for each, the tuner that chooses, CUDA graphs."""
