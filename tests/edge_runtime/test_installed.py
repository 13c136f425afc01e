"""Models that are installed as packages."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import installed
from edge_runtime.errors import UsageError
from edge_runtime.installed import find_model, installed_models


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages of models, as pip lays them out; importing one ends the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name: str, files: tuple[str, ...] = ("model.onnx", "model.tflite")) -> Path:
        package = tmp_path / f"voice_{name}"
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('code of a model was run')")
        for file in files:
            (package / file).write_bytes(b"a model")
        info = tmp_path / f"voice_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: voice-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[edge_runtime.models]\n{name} = voice_{name}\n")
        return package

    # The model that the project itself may have installed here.
    monkeypatch.setattr(installed, "GROUP", "edge_runtime.models")
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [e for e in real(group=group) if e.value.startswith("voice_")],
    )
    return add


def test_the_only_installed_model_is_the_default_and_has_a_name(install):
    package = install("german")
    assert find_model(None) == find_model("german") == package / "model.onnx"
    assert "voice_german" not in sys.modules


def test_several_installed_models_must_be_named(install):
    install("german")
    install("italian")
    with pytest.raises(UsageError, match="several are installed: german, italian"):
        find_model(None)
    assert find_model("italian").parent.name == "voice_italian"


def test_without_an_installed_model_one_is_recommended(install):
    with pytest.raises(UsageError, match=r"no model: name a file, .* pip install ser-edge-emodb"):
        find_model(None)
    with pytest.raises(UsageError, match="german: no such file, and no installed model; none is installed"):
        find_model("german")


def test_a_misspelt_name_is_answered_with_the_nearest(install):
    install("german")
    with pytest.raises(UsageError, match="did you mean 'german'"):
        find_model("germann")


@pytest.mark.parametrize("given", ["emotion.onnx", "models/german", "./german"])
def test_what_looks_like_a_file_is_one(install, given):
    install("german")
    assert find_model(given) == Path(given)


def test_whoever_names_a_file_waits_for_no_list_of_packages():
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import edge_runtime.recognizer\n"
        "from edge_runtime.installed import find_model\n"
        "find_model('model.onnx')\n"
        "sys.exit('importlib.metadata' in set(sys.modules) - before)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_file_without_a_suffix_goes_before_a_name(install, tmp_path, monkeypatch):
    install("german")
    monkeypatch.chdir(tmp_path)
    Path("german").write_bytes(b"mine")
    assert find_model("german") == Path("german")


def test_the_file_is_the_one_that_can_be_run(install, monkeypatch):
    package = install("german")
    real = installed.find_spec
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    assert installed_models() == {"german": package / "model.tflite"}


def test_a_package_without_its_file_is_no_model(install):
    install("empty", files=())
    assert installed_models() == {}


def test_a_broken_package_is_no_model_and_a_folder_hides_none(install, tmp_path, monkeypatch):
    package = install("german")
    (tmp_path / "voice_german-1.0.dist-info" / "entry_points.txt").write_text(
        "[edge_runtime.models]\ngerman = voice_german\nlost = voice_nowhere\ninner = voice_german.inner\n"
    )
    monkeypatch.chdir(tmp_path)
    Path("german").mkdir()
    assert installed_models() == {"german": package / "model.onnx"}
    assert find_model("german") == package / "model.onnx"
    assert "voice_german" not in sys.modules
