"""The instruction sets that plans run on."""

import pytest

from tests.engine.nets import ISAS, supported


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if not supported(request.param):
        pytest.skip(f"no {request.param} here")
    monkeypatch.setenv("GATEDCONV_ISA", request.param)
    return request.param
