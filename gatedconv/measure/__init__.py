"""MACs, latency, interleaved timing and energy."""
