from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from edge_runtime import settings as settings_module
from edge_runtime.errors import MissingDependencyError, UsageError
from edge_runtime.settings import FIXED, PER_LABEL, Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "utterence"}, "mode is 'utterence'; did you mean 'utterance'? valid: utterance, window"),
        ({"mode": 3}, "mode is 3; valid: utterance, window"),
        ({"threshold": {"joy": 2}}, "threshold of 'joy' is 2; valid: 0 to 1"),
        ({"threshold": {"joy": None}}, "threshold of 'joy' is None; valid: 0 to 1"),
        ({"enter": {"joy": True}}, "enter of 'joy' is True; valid: 0 to 1"),
        ({"hop": {"joy": 1}}, "hop is {'joy': 1}; valid: 0.05 to 60"),
        ({"exit": 0.5}, "exit is given without enter; give both or none"),
        ({"enter": 0.5, "exit": 0.6}, "exit is 0.6; valid: at most its enter, 0.5"),
        ({"enter": {"joy": 0.5}, "exit": 0.6}, "exit of 'joy' is 0.6; valid: at most its enter, 0.5"),
        ({"enter": 0.5, "exit": {"joy": 0.6}}, "exit of 'joy' is 0.6; valid: at most its enter, 0.5"),
        ({"min_duration": -1}, "min_duration is -1; valid: 0 to 3600"),
        ({"vad": 3}, "vad is 3; valid: a file, or None"),
        ({"vad_threshold": 0}, "vad_threshold is 0; valid: 0.01 to 0.99"),
    ],
)
def test_a_setting_that_cannot_be_is_named(change, message):
    with pytest.raises(UsageError, match=re.escape(f"settings: {message}")):
        Settings(**change)


def test_exit_of_a_label_that_does_not_enter_is_no_contradiction():
    assert Settings(enter={"joy": 0.5}, exit={"joy": 0.4, "anger": 0.9}).exit["anger"] == 0.9


@pytest.fixture
def file(tmp_path):
    return tmp_path / "settings.toml"


def test_a_file_gives_what_python_gives(file):
    file.write_text('device = "USB"\nhop = 1\nmode = "utterance"\n[threshold]\njoy = 0.7\n')
    assert Settings.from_file(file) == Settings(device="USB", hop=1, mode="utterance", threshold={"joy": 0.7})
    assert Settings.from_file(file, hop=0.25).hop == 0.25


def test_the_vad_of_a_file_is_beside_it(file, tmp_path):
    file.write_text('vad = "silero_vad.onnx"')
    assert Settings.from_file(file).vad == str(tmp_path / "silero_vad.onnx")
    file.write_text('vad = "/opt/silero_vad.onnx"')
    assert Settings.from_file(file).vad == "/opt/silero_vad.onnx"
    assert Settings.from_file(file, vad="mine.onnx").vad == "mine.onnx"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("treshold = 0.5", "unknown setting 'treshold'; did you mean 'threshold'? valid: buffer, calibration"),
        ("hop = 0", "hop is 0; valid: 0.05 to 60"),
        ("hop =", "not TOML (Invalid value"),
        ("hop = 1\nhop = 2", "not TOML (Cannot overwrite a value"),
        ("[hop]\nx = 1", "hop is {'x': 1}; valid"),
        ("exit_on_loss = 1", "exit_on_loss is 1; valid: True, False"),
        (b"\xff\xfe", "not TOML ('utf-8' codec"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(file, content, message):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as raised:
        Settings.from_file(file)
    assert str(raised.value).startswith(f"{file}: {message}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(file):
    with pytest.raises(UsageError, match=re.escape(f"{file}: settings cannot be read (No such file or directory)")):
        Settings.from_file(file)


def test_without_a_reader_of_toml_one_line_says_what_to_install(file, monkeypatch):
    file.write_text("hop = 1")
    monkeypatch.setattr(settings_module.sys, "version_info", (3, 10))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(MissingDependencyError, match="pip install tomli"):
        Settings.from_file(file)


def test_the_example_names_every_setting_with_its_default(file):
    lines = [line[2:] for line in (ROOT / "deploy/settings.toml").read_text().splitlines()]
    keys = [line for line in lines if re.fullmatch(r"\w+ = \S+|\[\w+\]", line)]
    file.write_text("\n".join(keys))
    found = Settings.from_file(file)
    named = {re.match(r"\[?(\w+)", line)[1] for line in keys} - {"anger"}
    assert named == {setting.name for setting in fields(Settings)}
    for setting in fields(Settings):
        assert setting.default is None or getattr(found, setting.name) == setting.default


def test_every_setting_has_a_documentation_and_an_option():
    source = Path(settings_module.__file__).read_text(encoding="utf-8")
    usage = subprocess.run(
        [Path(sys.executable).with_name("ser-edge"), "listen", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for setting in fields(Settings):
        assert re.search(rf'^    {setting.name}: .*\n    """', source, re.MULTILINE), setting.name
        assert f"--{setting.name.replace('_', '-')} " in usage


def test_the_sources_settings_are_settings():
    assert set(FIXED) | set(PER_LABEL) <= {setting.name for setting in fields(Settings)}
