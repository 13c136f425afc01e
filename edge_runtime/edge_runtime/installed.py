"""Models that are installed as Python packages: found by name, without running any code of theirs.

Such a package has the entry point group ``edge_runtime.models``; each entry names a model and the folder (a package)
that holds it as ``model.onnx``, ``model.tflite`` or both. pip checks its hash when it is installed, and the file's own
seal is checked whenever it is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edge_runtime.errors import UsageError, nearest

GROUP = "edge_runtime.models"

EXAMPLE = "ser-edge-emodb"
"""The distribution that is recommended to whoever has no model."""

RUNS_ON = {"model.onnx": ("onnxruntime",), "model.tflite": ("ai_edge_litert", "tflite_runtime")}
"""Files of a package, the preferred one first, and the libraries that run them."""


def installed_models() -> dict[str, Path]:
    """Return the file of every installed model by its name: the one that an installed inference library can run.

    Where no library is installed, the first file stands for the model, and whoever loads it is told what to install.
    """
    # Its import takes longer than all of this module's others: not for whoever names a file.
    from importlib.metadata import entry_points

    found = {entry.name: _file(entry.value) for entry in entry_points(group=GROUP)}
    return {name: path for name, path in sorted(found.items()) if path is not None}


def find_model(given: str | None) -> Path:
    """Return the model file that is meant.

    Args:
        given: a file, or the name of an installed model; None for the only one installed.

    Raises:
        UsageError: none given and none or several installed, or neither a file nor a name.
    """
    # Looking through all installed packages takes a board some hundredths of a second: not for a file.
    if given is not None and (Path(given).suffix or Path(given).is_file() or "/" in given):
        return Path(given)
    models = installed_models()
    if given in models:
        return models[given]
    if given is not None:
        known = nearest(given, models) if models else f"none is installed; e.g. pip install {EXAMPLE}"
        raise UsageError(f"{given}: no such file, and no installed model; {known}")
    if len(models) == 1:
        return next(iter(models.values()))
    which = f"several are installed: {', '.join(models)}" if models else f"or install one: pip install {EXAMPLE}"
    raise UsageError(f"no model: name a file, as written by sertool export; {which}")


def _file(package: str) -> Path | None:
    if "." in package:  # looking into a package would import what is around it
        return None
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = [folder / name for name in RUNS_ON for folder in folders if (folder / name).is_file()]
    runnable = [path for path in files if any(find_spec(library) for library in RUNS_ON[path.name])]
    return next(iter(runnable or files), None)
