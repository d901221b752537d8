"""Which convolution kernels run on CUDA: a flag with a default from the environment."""

from __future__ import annotations

import pytest

from gatedconv import ops
from gatedconv.ops import _masked_conv2d_cuda


def test_the_flag_goes_before_the_variable_and_is_put_back(monkeypatch):
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "auto")
    assert _masked_conv2d_cuda.kernels_mode() == "auto"
    with ops.cuda_kernels("on"):
        with pytest.raises(KeyError), ops.cuda_kernels("off"):
            assert _masked_conv2d_cuda.kernels_mode() == "off"
            raise KeyError
        assert _masked_conv2d_cuda.kernels_mode() == "on"
    assert _masked_conv2d_cuda.kernels_mode() == "auto"
    monkeypatch.delenv("GATEDCONV_CUDA_KERNELS")
    assert _masked_conv2d_cuda.kernels_mode() == "off"


def test_other_modes_are_refused_by_name(monkeypatch):
    expected = "expected off, on, auto or experimental, got 'yes'"
    with pytest.raises(ValueError, match=f"cuda_kernels: {expected}"), ops.cuda_kernels("yes"):
        pass
    assert _masked_conv2d_cuda.kernels_mode() == "off"
    monkeypatch.setenv("GATEDCONV_CUDA_KERNELS", "yes")
    with pytest.raises(ValueError, match=f"GATEDCONV_CUDA_KERNELS: {expected}"):
        _masked_conv2d_cuda.kernels_mode()
