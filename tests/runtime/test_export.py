"""export(..., format="plan") and `gatedconv export --format plan`: what is written, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import gatedconv
from gatedconv.cli import main
from tests.image_files import write_npz
from tests.runtime.conftest import X, small_net
from tests.tolerances import assert_close


class Last(nn.Module):
    """A network that ends in something else than a plan's output."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 4, 3), end

    def forward(self, x):
        return self.end(self.conv(x))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda y: {"out": y}, "returns something else than one tensor"),
        (
            lambda y: torch.fft.fft(y).real,
            r"_fft_r2c \(_fft_r2c\) would stay in PyTorch, and a plan holds a whole network",
        ),
        (lambda y: y.cumsum(2), r"cumsum \(cumsum\) would stay in PyTorch"),
        (lambda y: y if y.sum() > 0 else -y, "the model cannot be written as a graph: its code reads numbers"),
    ],
)
def test_what_would_stay_in_pytorch_is_refused_by_name(tmp_path, end, words):
    with pytest.raises(ValueError, match=words) as caught:
        gatedconv.export(Last(end).eval(), tmp_path / "net.plan", X, format="plan")
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"classes": ["a"]}, "a name for each of 5 outputs, got 1"),
        ({"classes": ["a", "b", "c", "d\n", "e"]}, r"names of one line, got 'd\\n'"),
        ({"classes": ["a", "b", "c", "d", 5]}, "names of one line, got 5"),
        ({"mean": (0.5,)}, "mean: expected a number for each of 3 channels, got 1"),
        ({"std": (0.5, 0.0, 1.0)}, "std: expected positive numbers"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(tmp_path, about, words):
    with pytest.raises(ValueError, match=words):
        gatedconv.export(small_net(), tmp_path / "net.plan", X, format="plan", **about)
    if "std" not in about:
        with pytest.raises(ValueError, match="kept in a plan alone, not in 'torch'"):
            gatedconv.export(small_net(), tmp_path / "net.pt2", X, format="torch", **about)


def test_an_engine_exports_its_own_plan(rt, tmp_path):
    engine = gatedconv.Engine(small_net(), X[:1])
    gatedconv.export(engine, tmp_path / "net.plan", X[:1], format="plan")
    net = rt.load(tmp_path / "net.plan")
    assert net.input_size == (1, 3, 16, 16)
    np.testing.assert_array_equal(net(X.numpy()), engine(X).numpy())


@pytest.mark.usefixtures("shallow")
def test_a_model_file_and_a_run_are_exported_from_the_command_line(rt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gatedconv.train.trainer.write_exports", lambda *_: [])  # of the other formats
    model = gatedconv.models.resnet20(input_size=(3, 16, 16)).eval()
    gatedconv.save(model, tmp_path / "net.safetensors")
    assert main(["export", str(tmp_path / "net.safetensors"), "--format", "plan"]) == 0
    net = rt.load(tmp_path / "net.plan")
    assert net.classes is None and net.mean is None
    np.testing.assert_array_equal(net(X.numpy()), gatedconv.Engine(model, X[:1])(X).numpy())
    data, run = write_npz(tmp_path / "blobs.npz"), tmp_path / "run"
    quick = ["--data", f"npz:{data}", "--epochs", "1", "--batch-size", "16", "--no-latency"]
    assert main(["train", *quick, "--run", str(run)]) == 0, capsys.readouterr().err
    assert main(["export", str(run), "--format", "plan"]) == 0, capsys.readouterr().err
    net = rt.load(run / "compact.plan")
    assert net.classes == ("0", "1", "2") and net.input_size == (1, 1, 8, 8)
    with np.load(data) as archive:
        pixels = archive["train_images"] / 255
    assert_close((*net.mean, *net.std), (pixels.mean(), pixels.std()), terms=1)
    data.unlink()  # the summary has what the plan names
    summary = json.loads((run / "summary.json").read_text())
    assert (tuple(summary["images"]["mean"]), tuple(summary["images"]["classes"])) == (net.mean, net.classes)
    capsys.readouterr()
    export_again = ["export", str(run), "--format", "plan", "--out", str(tmp_path / "again.plan")]
    assert main(export_again) == 0 and "no classes" not in capsys.readouterr().out
    again = rt.load(tmp_path / "again.plan")
    assert (again.classes, again.mean, again.std) == (net.classes, net.mean, net.std)
    (run / "summary.json").write_text(json.dumps({key: summary[key] for key in summary.keys() - {"images"}}))
    assert main(export_again) == 0 and "names no classes and no normalization" in capsys.readouterr().out
    assert rt.load(tmp_path / "again.plan").classes is None
