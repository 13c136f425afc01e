"""Install ``ser-edge[onnx,mic]`` into an empty environment and check that it brings what it needs and no more.

    python tools/check_edge_install.py            # or, with LiteRT instead of onnxruntime: ... tflite

Prints each package with its size; exit code 1 if one is there that a board should not have to carry, or if our
own wheel has grown beyond :data:`LARGEST_WHEEL`.
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

LIBRARIES = {"onnx": "onnxruntime", "tflite": "ai-edge-litert"}

LARGEST_WHEEL = 150_000
"""Bytes."""

# What the two libraries and sounddevice ask for in turn.
BROUGHT = {
    "onnx": {
        "coloredlogs", "flatbuffers", "humanfriendly", "ml-dtypes", "mpmath", "packaging", "protobuf", "sympy",
    },
    "tflite": {"backports.strenum", "flatbuffers", "protobuf", "tqdm", "typing-extensions"},
}  # fmt: skip
MICROPHONE = {"cffi", "pycparser"}
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

READ_PAGE = "from importlib.resources import files; files('edge_runtime').joinpath('live.html').read_text()"


def build(folder: Path) -> Path:
    """Build the wheel in ``folder`` and return it."""
    # From a copy, because building leaves files behind that a later build would pick up.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(REPOSITORY / "edge_runtime", folder / "source", ignore=ignored)
    options: list[str | Path] = ["--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True)
    return next(folder.glob("*.whl"))


def install(folder: Path, wheel: Path, extra: str) -> Path:
    """Install with the library of an extra into a new environment in ``folder``; return its folder of programs."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", f"{wheel}[{extra},mic]"], check=True)
    return programs


def main() -> None:
    """Install, list, run ``ser-edge info`` on a model made by hand."""
    extra = sys.argv[1] if len(sys.argv) > 1 else "onnx"
    if extra not in LIBRARIES:
        sys.exit(f"check_edge_install: {extra!r} is no extra with a library; valid: {', '.join(LIBRARIES)}")
    needed = {"ser-edge", "numpy", "sounddevice", LIBRARIES[extra]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        size = wheel.stat().st_size
        programs = install(folder, wheel, extra)
        listing = subprocess.run([programs / "python", "-c", LIST_PACKAGES], capture_output=True, text=True, check=True)
        sizes: dict[str, int] = json.loads(listing.stdout)
        carried = {package: size for package, size in sizes.items() if package not in INSTALLERS}
        for package, size in sorted(carried.items(), key=lambda item: -item[1]):
            print(f"{package:<16} {size / 1e6:8.2f} MB")
        print(f"{'together':<16} {sum(carried.values()) / 1e6:8.2f} MB")
        print(f"{'our own wheel':<16} {size / 1e6:8.2f} MB")
        model = folder / f"tiny.{extra}"
        subprocess.run([sys.executable, REPOSITORY / "tools" / "tiny_artifact.py", model], check=True)
        subprocess.run([programs / "ser-edge", "info", model], check=True)
        subprocess.run([programs / "python", "-c", READ_PAGE], check=True)
    if size > LARGEST_WHEEL:
        sys.exit(f"check_edge_install: the wheel has {size:,} bytes; at most {LARGEST_WHEEL:,}")
    if surplus := sorted(carried.keys() - needed - BROUGHT[extra] - MICROPHONE):
        sys.exit(f"check_edge_install: not expected on a board: {', '.join(surplus)}")
    if missing := sorted(needed - carried.keys()):
        sys.exit(f"check_edge_install: missing: {', '.join(missing)}")


if __name__ == "__main__":
    main()
