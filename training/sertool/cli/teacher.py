"""``sertool teacher``: tune a speech encoder on an emotional corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from edge_runtime.errors import UsageError
from sertool.cli.console import print_json, print_status, progress_bar

if TYPE_CHECKING:
    from sertool.teacher.tune import TuningReport

app = typer.Typer(no_args_is_help=True, help="Tune a speech encoder on an emotional corpus, so that it can teach.")


@app.callback()
def _group() -> None:
    """Keep ``tune`` a subcommand while it is the only one."""


@app.command("tune")
def tune(
    encoder: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder of a transformers speech encoder (Whisper, wav2vec 2.0, HuBERT, WavLM), or its name on the "
            "Hugging Face hub (owner/name or owner/name@revision).",
        ),
    ],
    manifest: Annotated[Path, typer.Option(help="The corpus.")] = Path("manifest.csv"),
    split: Annotated[Path, typer.Option(help="Who trains and who tests.")] = Path("split.json"),
    fold: Annotated[int, typer.Option(min=1, help="Fold of the split, counted from 1.")] = 1,
    parts: Annotated[
        list[str],
        typer.Option("--part", help="Part of the split that is trained on: train, validation; repeatable."),
    ] = ["train"],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", help="Teacher folder.")] = Path("teacher"),
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Tune up to this block and drop those above.", show_default="the last"),
    ] = None,
    freeze: Annotated[
        str,
        typer.Option(
            metavar="none|N|all",
            help="none: only the convolutions in front, as in the paper; N: the lowest N blocks too; all: the whole "
            "encoder, only FC1 and FC2 are trained.",
        ),
    ] = "none",
    epochs: Annotated[int, typer.Option(min=1, help="The last one is the result.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 3e-5,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(help="Of FC1 and FC2.", show_default="--learning-rate; 0.0003 above frozen blocks"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=30, help="Clips are repeated or cut to this length.")] = 4.0,
    corpus: Annotated[
        str, typer.Option(help="Name of the corpus, for the record.", show_default="the manifest's name")
    ] = "",
    licence: Annotated[
        str, typer.Option(help="Licence that the corpus puts on the weights.", show_default="that of a known corpus")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the heads, the order and the dropout.")] = 0,
    precision: Annotated[str, typer.Option(help="auto (bf16 where the hardware has it), bf16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put FC1 (256) and FC2 (one output a label) on an encoder and train them, and the encoder unless it is frozen.

    The last epoch is the result; validation and test speakers are only predicted, at the end. What frozen blocks give
    is computed once and cached. The same command goes on with an interrupted tuning; Ctrl-C is safe at any time.

    Examples:

      sertool teacher tune --encoder facebook/wav2vec2-base --manifest ravdess.csv --split split.json -o teacher

      sertool teacher tune --encoder whisper-base-encoder --layer 3 --freeze all --manifest ravdess.csv -o frozen

      sertool teacher tune --encoder whisper-base-encoder --layer 4 --freeze 2 --epochs 10 --manifest ravdess.csv

      torchrun --standalone --nproc_per_node 8 -m sertool teacher tune --encoder facebook/wav2vec2-base
    """
    from sertool.run import read_metrics
    from sertool.teacher.tune import tune
    from sertool.teacher.tuned import parse_settings

    settings = parse_settings(
        {
            "encoder": str(Path(encoder).absolute()) if Path(encoder).is_dir() else encoder,
            "manifest": str(manifest.absolute()),
            "split": str(split.absolute()),
            "fold": fold,
            "parts": parts,
            "corpus": corpus or manifest.stem,
            "licence": licence,
            "layer": layer,
            "freeze": _parse_freeze(freeze),
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "head_learning_rate": head_learning_rate,
            "window_samples": round(seconds * 16000),
            "seed": seed,
            "precision": precision,
            "device": device,
            "threads": threads,
        }
    )
    with progress_bar() as progress:
        done = tune(
            settings,
            output,
            on_start=lambda line: print_status(f"{output}: {line}"),
            on_epoch=_epoch_display(progress, output, epochs),
            on_prepare=_prepare_display(progress),
        )
    if not done:
        print_status(f"{output}: finished already")
    metrics = read_metrics(output)
    if json:
        print_json({"folder": str(output), "metrics": metrics})
        return
    for part, entry in metrics.items():
        typer.echo(_describe(part, entry))
    typer.echo(f"{output}: tuned; now run: sertool embed MANIFEST --teacher {output} --at fc1")


def _parse_freeze(text: str) -> str | int:
    if text in ("none", "all"):
        return text
    if not text.isdecimal():
        raise UsageError(f"--freeze {text!r}: expected none, all, or a number of blocks")
    return int(text) or "none"


def _prepare_display(progress: Progress) -> Callable[[int, int], None]:
    task = progress.add_task("frozen part", visible=False)

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, visible=done < total)

    return show


def _epoch_display(progress: Progress, folder: Path, epochs: int) -> Callable[[TuningReport], None]:
    """Return what shows each epoch: a bar on a terminal, elsewhere a line an epoch."""
    task = progress.add_task("tuning", total=epochs)

    def show(report: TuningReport) -> None:
        text = f"loss {report.loss:.3f}"
        if report.validation_uar is not None:
            text += f", validation UAR {report.validation_uar:.1%}"
        progress.update(task, completed=report.epoch, description=text)
        if progress.disable:
            print_status(f"{folder}: epoch {report.epoch}/{report.epochs}, {text}, {report.seconds:.1f} s")

    return show


def _describe(part: str, entry: dict[str, Any]) -> str:
    interval = entry["uar_interval"]
    between = f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%} over speakers)" if interval else ""
    return f"{part}: accuracy {entry['accuracy']:.1%}, UAR {entry['uar']:.1%}{between}, {entry['items']} clips"
