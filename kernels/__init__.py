"""Triton kernels, imported as ``gatedconv.kernels``; they import nothing of the rest of gatedconv."""

if __name__ != "gatedconv.kernels":
    # From the root of the repository Python would find this folder under its bare name and make a second copy
    # of every module in it, with every operator registered twice.
    raise ImportError(f"import this package as gatedconv.kernels, not as {__name__}")
