"""Put a trained run into a folder of models/: both files, their cards, the recipe, and the results that vouch for it.

python tools/release_model.py runs/release runs/folds models/emodb
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from edge_runtime.errors import SerError
from edge_runtime.recognizer import Recognizer
from sertool.files import write_text
from sertool.recipe import write_recipe
from sertool.run import Run, load_run

SUFFIXES = (".onnx", ".tflite")


def main() -> None:
    """Release a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="trained on all speakers: sertool split make --protocol release")
    parser.add_argument("folds", type=Path, help="runs of the same recipe on other speakers each, evaluated")
    parser.add_argument("folder", type=Path, help="of the model's package")
    parser.add_argument("--licence", help="of the weights; that of the corpora when left out")
    arguments = parser.parse_args()
    package = next(arguments.folder.glob("*/__init__.py")).parent
    for suffix in SUFFIXES:
        export(arguments.run, arguments.folds, package / f"model{suffix}", arguments.licence)
    write_text(arguments.folder / "recipe.toml", portable_recipe(load_run(arguments.run)))
    results = Recognizer(package / "model.onnx").artifact.metrics
    write_text(arguments.folder / "folds.json", json.dumps(results, indent=1) + "\n")


def export(run: Path, folds: Path, file: Path, licence: str | None) -> None:
    """Write one file of a run, as an 8-bit stream."""
    form = ["--precision", "int8", "--form", "stream", "--force", *(["--licence", licence] if licence else [])]
    sertool = Path(sys.executable).with_name("sertool")
    subprocess.run([sertool, "export", run, "--folds", folds, "-o", file, *form], check=True)


def portable_recipe(run: Run) -> str:
    """Return a run's recipe with the names of its files, as they are made by the commands in the model's README."""
    data = run.recipe.data
    names = {"manifest": Path(data.manifest).name, "split": Path(data.split).name}
    return write_recipe(run.recipe.model_copy(update={"data": data.model_copy(update=names)}))


if __name__ == "__main__":
    try:
        main()
    except SerError as error:
        sys.exit(f"release_model: {error}")
