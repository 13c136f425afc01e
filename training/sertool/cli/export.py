"""``sertool export``: one self-describing model file for the device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sertool.cli.console import OUTPUT, print_json, print_status, progress_bar

if TYPE_CHECKING:
    from sertool.export.artifact import Export


def export(
    run: Annotated[Path, typer.Argument(help="A run folder (one fold), evaluated by: sertool evaluate.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; replaced if it exists.")],
    file_format: Annotated[
        str | None, typer.Option("--format", help="onnx or tflite; without it, what the file's name ends on.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="int8: a quarter of the size, and faster; fp16: half the size; or fp32.")
    ] = "int8",
    form: Annotated[
        str, typer.Option(help="window; or stream: every frame is computed once (causal networks only).")
    ] = "window",
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights; without it, that of the training corpus.")
    ] = None,
    calibration_clips: Annotated[
        int, typer.Option(min=1, help="Clips of training speakers to measure int8 ranges on.")
    ] = 64,
    force: Annotated[bool, typer.Option("--force", help="Export without a test evaluation.")] = False,
    folds: Annotated[
        Path | None,
        typer.Option(
            metavar="RUNS",
            help="Folds of the same recipe that vouch for a run on all speakers: results, temperature, thresholds.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a run as one file that ser-edge runs, with labels, front-end, licence, origin and results inside.

    The file is first compared with the trained network on clips of training speakers; if they disagree, nothing is
    written.

    Examples:

      sertool export runs/graph -o emotion.onnx

      sertool export runs/graph --precision fp32 --licence CC-BY-4.0 -o emotion-fp32.onnx

      sertool export runs/graph -o emotion.tflite

      sertool export runs/causal --form stream -o emotion-stream.onnx

      sertool export runs/release --folds runs/loso --form stream -o emotion.onnx
    """
    from sertool.export.artifact import export_run
    from sertool.run import load_run

    replaced = output.is_file()
    with progress_bar() as progress:
        task = progress.add_task("exporting", total=None)
        result = export_run(
            load_run(run),
            output,
            file_format=file_format,
            precision=precision,
            form=form,
            licence=licence,
            calibration_clips=calibration_clips,
            force=force,
            folds=folds,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if replaced:
        print_status(f"{output}: replaced")
    if json:
        print_json(_summary(result))
    else:
        _print(result)


def _summary(result: Export) -> dict[str, Any]:
    from sertool.export.card import card_path

    artifact = result.artifact
    return {
        "file": str(result.path),
        "bytes": result.size_bytes,
        "network": artifact.network,
        "precision": artifact.precision,
        "form": artifact.form,
        "labels": list(artifact.labels),
        "parameters": artifact.parameters,
        "macs": artifact.macs,
        "licence": artifact.licence,
        "card": str(card_path(result.path)),
        "temperature": artifact.temperature,
        "evaluated": bool(artifact.metrics),
        "parity": asdict(result.parity),
    }


def _print(result: Export) -> None:
    from sertool.export.card import card_path

    artifact, parity = result.artifact, result.parity
    table = Table(show_header=False)
    table.add_row("file", str(result.path))
    table.add_row("size", f"{result.size_bytes / 1e6:.2f} MB")
    table.add_row("network", f"{artifact.network}, {artifact.precision}, {artifact.form}")
    table.add_row("parameters", f"{artifact.parameters / 1e6:.2f} M")
    table.add_row("MACs a window", f"{artifact.macs / 1e6:.0f} M for {artifact.window_seconds:.2f} s")
    table.add_row("same label as the run", f"{parity.agreement:.1%} of {parity.clips} training clips")
    table.add_row("logits against the run", f"SNR {parity.snr_db:.0f} dB, at most {parity.max_error:.2g} off")
    table.add_row("licence", artifact.licence)
    table.add_row("model card", str(card_path(result.path)))
    OUTPUT.print(table)
    typer.echo(f"now run: ser-edge info {result.path}")
