"""Install ``ser-edge[onnx,mic]`` into an empty environment and check that it brings what it needs and no more.

    python tools/check_edge_install.py

Prints each package with its size; exit code 1 if one is there that a board should not have to carry.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# What ser-edge asks for, and what those ask for in turn: onnxruntime the middle row, sounddevice the last one.
EXPECTED = {
    "ser-edge", "numpy", "onnxruntime", "sounddevice",
    "coloredlogs", "flatbuffers", "humanfriendly", "ml-dtypes", "mpmath", "packaging", "protobuf", "sympy",
    "cffi", "pycparser",
}  # fmt: skip
INSTALLERS = {"pip", "setuptools", "wheel"}

LIST_PACKAGES = """
import json
from importlib.metadata import distributions
print(json.dumps({
    d.metadata["Name"].lower().replace("_", "-"):
    sum(f.locate().stat().st_size for f in d.files or [] if f.locate().is_file() and f.suffix != ".pyc")
    for d in distributions()
}))
"""


def install(folder: Path) -> Path:
    """Install into a new environment in ``folder`` and return its folder of programs."""
    # From a copy, because building leaves files behind that a later build would pick up.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(REPOSITORY / "edge_runtime", folder / "source", ignore=ignored)
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", f"{source}[onnx,mic]"], check=True)
    return programs


def main() -> None:
    """Install, list, run ``ser-edge info`` on a model made by hand."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = install(folder)
        listing = subprocess.run([programs / "python", "-c", LIST_PACKAGES], capture_output=True, text=True, check=True)
        sizes: dict[str, int] = json.loads(listing.stdout)
        carried = {package: size for package, size in sizes.items() if package not in INSTALLERS}
        for package, size in sorted(carried.items(), key=lambda item: -item[1]):
            print(f"{package:<16} {size / 1e6:8.2f} MB")
        print(f"{'together':<16} {sum(carried.values()) / 1e6:8.2f} MB")
        model = folder / "tiny.onnx"
        subprocess.run([sys.executable, REPOSITORY / "tools" / "tiny_artifact.py", model], check=True)
        subprocess.run([programs / "ser-edge", "info", model], check=True)
    if surplus := sorted(carried.keys() - EXPECTED):
        sys.exit(f"check_edge_install: not expected on a board: {', '.join(surplus)}")
    if missing := sorted({"ser-edge", "numpy", "onnxruntime", "sounddevice"} - carried.keys()):
        sys.exit(f"check_edge_install: missing: {', '.join(missing)}")


if __name__ == "__main__":
    main()
