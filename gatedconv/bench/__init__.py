"""Measurements of a network in our engine and in other runtimes.

comparison.py: outputs checked, times interleaved. conv_case.py: one convolution with closed outputs. runtimes.py: the
runtimes and their settings, of which mobile.py has MNN, ncnn and LiteRT, quantizers.py int8, and exported.py the files
that they read. footprint.py: what ships.
"""
