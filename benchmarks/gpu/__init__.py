"""`make gpu`: parity and timings on a GPU, each case in a process of its own."""
