"""Cases as text, and that every algorithm of every case computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.masked_conv2d import CASES
from gatedconv.bench.conv_case import ConvCase, compare_layers


@given(st.data())
def test_a_case_is_read_back_from_its_text(data: st.DataObject) -> None:
    groups, kernel = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    dilation = data.draw(st.integers(1, 3))
    case = ConvCase(
        in_channels=groups * data.draw(st.integers(1, 99)),
        out_channels=groups * data.draw(st.integers(1, 99)),
        height=dilation * kernel + data.draw(st.integers(0, 99)),
        kernel=kernel,
        batch=data.draw(st.integers(1, 64)),
        width=data.draw(st.none() | st.integers(dilation * kernel, 99)),
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.none() | st.integers(0, 5)),
        dilation=dilation,
        groups=groups,
        open=data.draw(st.integers(0, 100) | st.just("odd")),
    )
    text = str(case)
    assert ConvCase.parse(text) == ConvCase.parse(text.replace(" ", "-")) == case
    assert ConvCase.is_meant(text) and ConvCase.parse(" ".join(reversed(text.split()))) == case
    x, weight, bias = replace(case, batch=1).tensors()
    out = F.conv2d(x, weight, bias, case.stride, case.pad, case.dilation, case.groups)
    assert out.shape[1:] == (case.out_channels, *case.out_size)


def test_the_texts_of_the_benchmarks_cases() -> None:
    assert all(ConvCase.parse(str(case)) == case for case in CASES)
    assert str(ConvCase.parse("k1 i96 open50 o24 h56")) == "n1 i96 o24 h56 k1 open50"
    case = ConvCase.parse("i16 o32 h32 k3 s2 openodd")
    assert str(case) == "n1 i16 o32 h32 k3 s2 openodd" and case.name == "16->32 3x3/2 @32, 15 of 32 open"
    case = ConvCase.parse("n2 i16 o32 h8 w9 k3 p0 d2 g4")
    assert str(case) == "n2 i16 o32 h8 w9 k3 p0 d2 g4 open100" and case.name == "16->32 3x3 p0 d2 g4 @8x9, 100 % open"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1 i96 o24 h56", "k missing"),
        ("n1 h56 open50", "i, o, k missing"),
        ("n1 i96 o24 h56 k1 open5O", "got 'open5O'"),
        ("n1 i96 o24 h56 k1 x3", "got 'x3'"),
        ("n1 i96 o24 h56 k", "got 'k'"),
        ("nodd i96 o24 h56 k1", "got 'nodd'"),
        ("n1 i96 i96 o24 h56 k1", "i is given twice"),
        ("n0 i96 o24 h56 k1", "batch must be at least 1, got 0"),
        ("i96 o24 h56 w0 k1", "width must be at least 1"),
        ("i96 o24 h56 k1 s0", "stride must be at least 1"),
        ("i96 o24 h56 k1 open101", "open must be a percentage from 0 to 100"),
        ("i96 o24 h56 k1 g5", "5 groups do not divide the channels"),
        ("i96 o24 h2 k5 p0", "kernel is larger than the padded map"),
        ("i96 o24 h99999 k1", "larger than 1 GiB"),
        ("i999999999 o999999999 h1 k1", "larger than 1 GiB"),
        ("i9999999999 o1 h1 k1", "got 'i9999999999'"),
        ("", "i, o, h, k missing"),
    ],
)
def test_what_is_no_case(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConvCase.parse(text)


def test_names_of_models_and_files_are_no_cases() -> None:
    names = ("resnet18", "runs/n1-i2", "efficientnet-b0", "vit_b_16", "my net.safetensors", "i3", "")
    assert [name for name in names if ConvCase.is_meant(name)] == []
    assert ConvCase.is_meant("n1 i96 o24 h56 k") and ConvCase.is_meant("n1-i96-x4")


@pytest.mark.parametrize(
    "text", ["n2 i6 o8 h7 w9 k3 p0 d2 g2 open50", "i8 o8 h9 k3 s2 g8 openodd", "i5 o3 h1 k1 open0"]
)
def test_every_algorithm_computes_every_geometry(text: str) -> None:
    case = ConvCase.parse(text)
    comparison = compare_layers(case, sample_ms=0)
    assert not comparison.failures and len(comparison.errors) == (10 if case.groups == 1 else 8)
