"""What a training keeps of its epochs: the state that the next one needs, and the history of those behind it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sertool.files import atomic_path, write_text
from sertool.run import RunError

Report = Mapping[str, Any]
"""What one epoch did, as far as JSON can hold it."""


def save_resume(
    path: Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], reports: Sequence[Report]
) -> None:
    """Write all that the next epoch needs, atomically.

    Args:
        path: the file, safetensors.
        optimizer: with the state that it has for each weight.
        state: all else that changes while training, by name; no name begins with ``optimizer.``.
        reports: one an epoch.
    """
    tensors = dict(state)
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, {"reports": json.dumps(list(reports))}))


def load_resume(path: Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Load what :func:`save_resume` wrote into the optimizer and into these very tensors.

    Returns:
        the reports so far; empty for a fresh start.

    Raises:
        RunError: the file is damaged, or of another network.
    """
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            reports: list[dict[str, Any]] = json.loads(file.metadata()["reports"])
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors.pop(name))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            _, number, kind = name.split(".")
            moments.setdefault(int(number), {})[kind] = tensor
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: damaged; delete it to start this run again") from error
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return reports


def save_history(path: Path, reports: Sequence[Report]) -> None:
    """Write the reports as a CSV table, one row an epoch."""
    text = io.StringIO()
    # The first epochs may have been trained by a version that reported less.
    writer = csv.DictWriter(text, list(reports[-1]), restval=0.0, lineterminator="\n")
    writer.writeheader()
    writer.writerows(reports)
    write_text(path, text.getvalue())
