"""``sertool parity``: exported files against the network they come from, on test speakers."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_runtime.errors import UsageError, nearest
from sertool.cli.console import OUTPUT, print_json, print_status, progress_bar
from sertool.cli.evaluate import describe_folds

FILES_A_TABLE = 3
"""More would be cut off on a terminal of 80 columns."""


def parity(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder above the folds of one.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files exported from it, of several folds one each; without any, it is exported here."),
    ] = None,
    precisions: Annotated[
        str, typer.Option("--export", help="Without FILES: what to export, e.g. int8 or fp32,int8.")
    ] = "fp32,int8",
    formats: Annotated[
        str, typer.Option("--format", help="Without FILES: in which formats, e.g. onnx,tflite.")
    ] = "onnx",
    forms: Annotated[str, typer.Option("--form", help="Without FILES: in which forms: window,stream.")] = "window",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare exported files with the trained network on the run's test speakers, by the device's own code.

    Prints, and writes into RUN/parity.json: UAR and its paired difference from the
    network's, share of equal answers, errors of probabilities and logits, size,
    time, memory, and whether the targets are met. With folds, the answers are
    pooled; time and memory are those of the first fold's files. An answer takes a
    whole window, of a stream its smallest hop. No exported file changes.

    Examples:

      sertool parity runs/graph/fold-1 emotion.onnx

      sertool parity runs/graph --export int8
    """
    from edge_runtime.artifact import FORMS
    from sertool.export.artifact import FORMATS, PRECISIONS
    from sertool.export.proof import answer_test_clips, export_folds, match_files, prove, save_proof
    from sertool.run import load_folds

    kinds = list(
        product(
            _listed("--format", formats, FORMATS),
            _listed("--export", precisions, PRECISIONS),
            _listed("--form", forms, FORMS),
        )
    )
    runs = load_folds(run)
    with TemporaryDirectory() as folder, progress_bar() as progress:
        task = progress.add_task("loading", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text, completed=0, total=None)

        def count(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        matched = match_files(runs, files or export_folds(runs, Path(folder), kinds, say))
        folds = []
        for fold in runs:
            if fold.path in matched:
                say(f"{fold.path.name}: test clips")
                folds.append(answer_test_clips(fold, matched[fold.path], count))
        say("time and memory")
        found = prove(folds)
    found = {"run": str(run)} | found
    print_status(f"{save_proof(run, found)}: written")
    if json:
        print_json(found)
    else:
        _print(found)


def _listed(option: str, text: str, valid: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in valid:
            raise UsageError(f"{option} {name!r} is not offered; {nearest(name, valid)}")
    return names


def _print(found: dict[str, Any]) -> None:
    typer.echo(f"{found['run']}: {found['clips']} test clips of {found['speakers']} speakers, {found['network']}")
    if found["folds_of"] > 1:
        typer.echo(describe_folds(found["folds"], found["folds_of"]))
    typer.echo(f"{found['parameters'] / 1e6:.2f} M parameters, {found['macs'] / 1e6:.0f} M multiply-adds a window")
    files = found["files"]
    for first in range(0, len(files), FILES_A_TABLE):
        OUTPUT.print(_table(files[first : first + FILES_A_TABLE]))
    latency = found["float_latency_ms"]
    typer.echo(f"a window in torch, one thread: median {latency['median']:.2f} ms, p95 {latency['p95']:.2f} ms")
    for file in files:
        for target in file["targets"]:
            met = "met" if target["met"] else "MISSED"
            typer.echo(f"{file['kind']}: {target['name']} {target['value']} ({target['bound']}): {met}")


def _table(files: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("", *(file["kind"] for file in files)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, cells in _rows(files).items():
        table.add_row(name, *cells)
    return table


def _rows(files: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {
        "UAR": [f"{file['uar']:.2%}" for file in files],
        "95 % interval": [_range(file["uar_interval"], ".1f") for file in files],
        "UAR in float": [f"{file['float_uar']:.2%}" for file in files],
        "difference, points": [f"{100 * file['difference']:+z.2f}" for file in files],
        "95 % interval, paired": [_range(file["difference_interval"], "+z.2f") for file in files],
        "same label": [f"{file['agreement']:.2%}" for file in files],
        "probability error": [f"{file['max_probability_difference']:.2g}" for file in files],
        "logit error": [f"{file['max_error']:.2g}" for file in files],
        "logits SNR": [f"{file['snr_db']:.0f} dB" for file in files],
        "size": [f"{file['bytes'] / 1e6:.2f} MB" for file in files],
        "an answer, median": [f"{file['latency_ms']['median']:.2f} ms" for file in files],
        "an answer, p95": [f"{file['latency_ms']['p95']:.2f} ms" for file in files],
        "load": [f"{file['load_seconds']:.2f} s" for file in files],
        "memory": [_megabytes(file["memory_bytes"]) for file in files],
    }


def _range(interval: list[float] | None, style: str) -> str:
    return "one speaker" if interval is None else " to ".join(format(100 * end, style) for end in interval)


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"
