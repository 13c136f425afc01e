"""Whether a model file is what its exporter wrote, and whether this machine computes what it should with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.backends import open_backend
from edge_runtime.errors import SerError
from edge_runtime.model_file import read_model_file
from edge_runtime.recognizer import Recognizer

CHECKS = ("integrity", "schema", "operators", "self-test")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: one of :data:`CHECKS`.
        passed: whether it is as it should be.
        detail: what was found; where it failed, what is wrong and what to do.
    """

    name: str
    passed: bool
    detail: str


def verify(path: str | Path, threads: int = 1) -> Iterator[Check]:
    """Check a model file: its bits, its description, its operators, and what it computes here.

    Each check needs those before it; the first that fails is the last one given. The inference library sees the file
    only after its bits and its description are found whole.

    Args:
        path: the model file.
        threads: threads per inference.
    """
    findings = _findings(path, threads)
    for name in CHECKS:
        try:
            yield Check(name, True, next(findings))
        except SerError as error:
            yield Check(name, False, str(error))
            return


def _findings(path: str | Path, threads: int) -> Iterator[str]:
    model = read_model_file(path)
    size = f"{len(model.content) / 1e6:.2f} MB"
    yield f"{size}, {model.content_hash or 'carries no hash to check, as files of schema 1 do not'}"
    artifact = model.artifact()
    yield f"schema {artifact.schema}, {artifact.network}, {artifact.precision}, {len(artifact.labels)} labels"
    open_backend(model, threads)
    yield ", ".join(model.operators)
    log_mel_off, logits_off = Recognizer(path, threads).self_test
    golden = artifact.golden
    yield (
        f"log-Mel within {log_mel_off:.2g} dB (at most {golden.log_mel_tolerance:g}), "
        f"logits within {logits_off:.2g} (at most {golden.logits_tolerance:g})"
    )
