"""A network of one's own: an installed package brings it, and the commands take it from recipe to device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from edge_runtime.cli import main as ser_edge
from edge_runtime.errors import SerError, UsageError
from sertool.export.onnx import to_onnx
from sertool.networks import NETWORKS, build_network
from sertool.plugins import BUILT_IN, network_names
from sertool.recipe import parse_recipe, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """
from torch import nn
from sertool.networks import Head, Student, TimeConv2d, TimeMaxPool2d


class Tiny(Student):
    def __init__(self, classes, time_padding, width=1.0):
        super().__init__()
        channels = int(16 * width)
        self.trunk = nn.Sequential(
            TimeConv2d(1, channels, 5, stride=2, time_padding=time_padding),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(),
            TimeConv2d(channels, channels, 3, time_padding=time_padding),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            TimeMaxPool2d(3, time_padding=time_padding),
        )
        self.head = Head(channels, classes, rectified_embedding=True)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Install a package ``mine`` whose network ``tiny`` is the class Tiny of the given code."""

    def install(code: str, value: str = "mine:Tiny") -> None:
        site = tmp_path / "site"
        info = site / "mine-1.2.dist-info"
        info.mkdir(parents=True)
        (site / "mine.py").write_text(code)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[sertool.networks]\ntiny = {value}\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "mine", raising=False)

    return install


def test_the_built_in_names_are_the_papers_networks() -> None:
    assert BUILT_IN == tuple(NETWORKS) == network_names()


def test_from_recipe_to_device(
    tones: Any,
    install: Callable[..., None],
    tmp_path: Path,
    sertool: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(TINY)
    listed = json.loads(sertool("networks", "--json").out)
    assert list(listed) == [*BUILT_IN, "tiny"]
    # 5x5 and 3x3 convolutions, two batch normalisations of four vectors each, two linear layers for 7 classes.
    assert listed["tiny"]["parameters"] == 25 * 16 + 9 * 256 + 2 * 4 * 16 + 17 * 256 + 257 * 7

    recipe = tones.recipe(
        network__name="tiny", network__time_padding="causal", training__epochs=4, training__batch_size=4
    )
    (tmp_path / "recipe.toml").write_text(write_recipe(recipe))
    run, model = tmp_path / "run", tmp_path / "model.onnx"
    assert sertool("train", tmp_path / "recipe.toml", "-o", run).code == 0
    assert json.loads((run / "environment.json").read_text())["versions"]["mine"] == "1.2"
    assert json.loads(sertool("evaluate", run, "--json").out)["items"] == 24
    outcome = sertool("export", run, "-o", model, "--json")
    assert (outcome.code, json.loads(outcome.out)["network"]) == (0, "tiny")

    clip = tmp_path / "clip.wav"
    samples, rate = soundfile.read(tones.folder / "cyd-joy-0.wav")
    soundfile.write(clip, np.tile(samples, 4), rate)
    monkeypatch.setattr(sys, "argv", ["ser-edge", "file", str(model), str(clip), "--json"])
    with pytest.raises(SystemExit) as stop:
        ser_edge()
    assert stop.value.code == 0
    probabilities = json.loads(capsys.readouterr().out)["probabilities"]
    assert set(probabilities) == {"anger", "joy", "sadness"}


def test_the_recipe_knows_the_names_without_torch(install: Callable[..., None], tmp_path: Path) -> None:
    install(TINY)
    assert parse_recipe({"network": {"name": "tiny"}}).network.name == "tiny"
    with pytest.raises(UsageError, match=r"^recipe: network\.name = 'tinny': did you mean 'tiny'\? valid: cnn6, "):
        parse_recipe({"network": {"name": "tinny"}})
    code = "import sys, sertool.cli, sertool.recipe as r; r.Recipe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BROKEN = {
    "import": ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    "attribute": ("", "AttributeError: module 'mine' has no attribute 'Tiny'"),
    "multi-line": ("def Tiny(*_):\n    raise RuntimeError('first\\nsecond')", "RuntimeError: first second"),
    "arguments": ("def Tiny(classes):\n    pass", "TypeError: Tiny() takes 1 positional argument but 3 were given"),
    "no student": ("from torch.nn import Linear\ndef Tiny(*_):\n    return Linear(1, 1)", "is a Linear; needed: a sub"),
    "no head": (TINY.replace("self.head =", "head ="), "its head is no sertool.networks.Head"),
    "classes": (TINY.replace("Head(channels, classes", "Head(channels, 1 + classes"), r"are (2, 8); needed: (2, 7)"),
    "channels": (TINY.replace("Head(channels", "Head(3"), "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "features": (
        TINY + "    def features(self, x):\n        return self.trunk(x)",
        "of 2 windows are (2, 16, ",
    ),
    "frames": (TINY + "    def features(self, x):\n        return self.trunk(x).mean(3)[..., :0]", "not finite"),
    "NaN": (TINY + "        self.head.fc2.bias.data[0] = float('nan')", "not finite before it is trained"),
    "future": (TINY.replace("padding=time_padding", "padding='same'"), "is not causal, a feature changes with later"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_network_is_one_line(
    tones: Any, install: Callable[..., None], tmp_path: Path, sertool: Callable[..., Any], fault: str
) -> None:
    code, message = BROKEN[fault]
    install(code)
    with pytest.raises(UsageError) as caught:
        build_network("tiny", 7, "causal")
    line = str(caught.value)
    assert line.startswith("network 'tiny' (mine:Tiny): ") and message in line and "\n" not in line
    if fault == "import":
        recipe = tones.recipe(network__name="tiny")
        (tmp_path / "recipe.toml").write_text(write_recipe(recipe))
        outcome = sertool("train", tmp_path / "recipe.toml", "-o", tmp_path / "run")
        assert (outcome.code, outcome.err.strip()) == (2, f"sertool: {line}")
        assert not (tmp_path / "run").exists()
        listed = sertool("networks", "--json")
        assert (listed.code, list(json.loads(listed.out))) == (0, list(BUILT_IN))
        assert listed.err == f"sertool: {line}\n"


def test_a_network_that_looks_ahead_is_good_with_the_papers_padding(install: Callable[..., None]) -> None:
    install(TINY.replace("padding=time_padding", "padding='same'"))
    build_network("tiny", 7, "same")


def test_a_network_that_onnx_cannot_express_is_refused_in_one_line() -> None:
    class Deciding(nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            return windows.mean((1, 2)) if float(windows.sum()) > 0 else windows.sum((1, 2))

    with pytest.raises(SerError, match=r"^network Deciding cannot be written as ONNX: .") as caught:
        to_onnx(Deciding().eval(), 32, 8)
    assert "\n" not in str(caught.value)
