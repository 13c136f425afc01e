from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")


@pytest.fixture(scope="module")
def installed(tmp_path_factory, model) -> Path:
    prefix = tmp_path_factory.mktemp("prefix")
    # Its own pip would fetch what is installed here already.
    environment = os.environ | {"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    program = prefix / "opt/ser-edge"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", program], check=True)
    # The venv of a venv sees the system's packages, not those of the venv that runs the tests.
    site = next(program.glob("lib/python*/site-packages"))
    (site / "here.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = install("--prefix", prefix, model, env=environment)
    assert done.returncode == 0, done.stderr
    return prefix


def install(*arguments, **options) -> subprocess.CompletedProcess:
    command = ["bash", str(DEPLOY / "install.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_installer_puts_everything_in_its_place(installed, model):
    assert (installed / "etc/ser-edge/model.onnx").read_bytes() == model.read_bytes()
    assert "MODEL=/etc/ser-edge/model.onnx\n" in (installed / "etc/ser-edge/ser-edge.conf").read_text()
    assert (installed / "etc/ser-edge/settings.toml").read_text() == (DEPLOY / "settings.toml").read_text()
    assert oct((installed / "etc/ser-edge/ser-edge.conf").stat().st_mode)[-3:] == "600"  # it may hold a password
    told = subprocess.run(
        [installed / "opt/ser-edge/bin/ser-edge", "info", installed / "etc/ser-edge/model.onnx"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "self-test    passed" in told.stdout


def test_installing_again_keeps_the_settings_and_removing_leaves_them(installed, model, tmp_path):
    prefix = tmp_path / "copy"
    shutil.copytree(installed, prefix, symlinks=True)
    settings = prefix / "etc/ser-edge/ser-edge.conf"
    settings.write_text(settings.read_text().replace("--device USB", "--device Jabra"))
    settings.with_name("settings.toml").write_text("hop = 1.0")
    assert install("--prefix", prefix, model, env=os.environ | {"PIP_NO_DEPS": "1"}).returncode == 0
    assert "--device Jabra" in settings.read_text()
    assert settings.with_name("settings.toml").read_text() == "hop = 1.0"
    removed = install("--prefix", prefix, "--uninstall")
    assert removed.returncode == 0
    assert settings.exists()
    assert not (prefix / "opt/ser-edge").exists()
    assert not (prefix / "etc/systemd/system/ser-edge.service").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which model? run:"),
        (["none.onnx"], "none.onnx: no such model file; make one with: sertool export"),
        ([__file__], "unknown model format; valid: .onnx, .tflite"),
        (["--prefxi"], "unknown option --prefxi; valid: --prefix DIR, --uninstall"),
    ],
)
def test_installer_names_what_is_wrong(arguments, complaint, tmp_path):
    done = install("--prefix", tmp_path / "prefix", *arguments)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "prefix").exists()


def test_a_foreign_model_is_refused_before_the_service_starts(installed, tmp_path):
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"not a model")
    prefix = tmp_path / "copy"
    shutil.copytree(installed, prefix, symlinks=True)
    done = install("--prefix", prefix, foreign, env=os.environ | {"PIP_NO_DEPS": "1"})
    assert done.returncode == 1
    assert "foreign.onnx" in done.stderr
    assert (prefix / "etc/ser-edge/model.onnx").is_file()


@needs_systemd
def test_unit_is_valid(installed, tmp_path):
    unit = tmp_path / "ser-edge.service"
    text = (DEPLOY / "ser-edge.service").read_text()
    unit.write_text(text.replace("/opt/ser-edge/bin/ser-edge", str(installed / "opt/ser-edge/bin/ser-edge")))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")  # an unknown key is a warning, and a mistake


@needs_systemd
def test_unit_is_hardened(tmp_path):
    unit = shutil.copy(DEPLOY / "ser-edge.service", tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = float(re.search(r"Overall exposure level .*?: ([\d.]+)", done.stdout)[1])
    assert exposure <= 3.0, done.stdout


def test_commands_in_the_files_exist():
    """Options named in unit, settings and container file are options of the command."""
    usage = subprocess.run(
        [Path(sys.executable).with_name("ser-edge"), "listen", "--help"], capture_output=True, text=True, check=True
    ).stdout
    texts = [(DEPLOY / name).read_text() for name in ("ser-edge.service", "ser-edge.conf", "home-assistant.yaml")]
    named = {
        option
        for text in texts
        for line in text.splitlines()
        if "ser-edge listen" in line or line.startswith("OPTIONS=")
        for option in re.findall(r"--[a-z-]+", line)
    } - {"--help"}
    assert "--mqtt-discovery" in named
    assert "--device" in named
    assert all(option in usage for option in named)
