"""The whole job in one go: corpus, teacher, graph, student with and without it, evaluation, export, recognition.

Every step is an ordinary command of ``sertool`` or ``ser-edge``, printed before it runs; finished steps are skipped
when the demo is started again. Without a corpus it speaks one with espeak-ng in two languages, and an earlier run of
our own on the first language is the teacher. With SERTOOL_DATA it takes a real corpus and the Whisper-base encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

BIN = Path(sys.executable).parent
CONSOLE = Console(highlight=False)

RECIPE = """\
[data]
manifest = "{folder}/manifest.csv"
split = "{folder}/split.json"
corpus = "{corpus}"
window_samples = {window_samples}

[training]
epochs = {epochs}
decay_epochs = 1
"""
# Synthetic sentences last about two seconds: 160 frames (2.6 s) instead of the paper's 373 save more than half the time.
SYNTHETIC_WINDOW = 41216
PAPER_WINDOW = 95744
GRAPH = ["--centre", "--threshold", "0.5", "--neighbours", "6"]
NEIGHBOURS = ["--set", "neighbours.count=6", "--set", "neighbours.alpha=0.1", "--set", "neighbours.mode=bank"]


def run(command: str, *arguments: str | Path, done: Path | None = None) -> None:
    """Print a command and run it; stop the demo with its exit code when it fails, skip it when ``done`` exists."""
    text = shlex.join([command, *map(str, arguments)])
    if done and done.exists():
        CONSOLE.print(f"\n[dim]$ {text}   (done before)[/dim]")
        return
    CONSOLE.print(f"\n[bold]$ {text}[/bold]", soft_wrap=True)
    code = subprocess.run([BIN / command, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def write_recipe(folder: Path, corpus: str, window_samples: int, epochs: int) -> Path:
    """Write the demo's recipe: the paper's settings, but a shorter training."""
    path = folder / "recipe.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.format(folder=folder, corpus=corpus, window_samples=window_samples, epochs=epochs))
    return path


def prepare_synthetic(folder: Path) -> tuple[list[str | Path], Path]:
    """Speak both corpora and train the teacher on the source; return the teacher's options and the target's recipe."""
    for name, language in (("source", "en"), ("target", "it")):
        run(
            "sertool", "corpus", "make", "synthetic", "--root", folder / name / "audio", "--language", language,
            "-o", folder / name / "manifest.csv", done=folder / name / "manifest.csv",
        )  # fmt: skip
        run(
            "sertool", "split", "make", folder / name / "manifest.csv", "--protocol", "kfold:4",
            "-o", folder / name / "split.json",
        )  # fmt: skip
    source = write_recipe(folder / "source", "synthetic", SYNTHETIC_WINDOW, epochs=8)
    run("sertool", "train", source, "-o", folder / "teacher")
    return ["--teacher", folder / "teacher"], write_recipe(
        folder / "target", "synthetic", SYNTHETIC_WINDOW, epochs=8
    )


def prepare_real(folder: Path, corpus: str, data: Path) -> tuple[list[str | Path], Path]:
    """Take a real corpus and the Whisper encoder; return the teacher's options and the target's recipe."""
    target = folder / "target"
    run(
        "sertool",
        "corpus",
        "make",
        corpus,
        "--root",
        data / "corpora" / corpus,
        "-o",
        target / "manifest.csv",
    )
    run(
        "sertool", "split", "make", target / "manifest.csv", "--protocol", "kfold:5",
        "-o", target / "split.json",
    )  # fmt: skip
    teacher: list[str | Path] = ["--teacher", data / "encoders" / "whisper-base-encoder", "--layer", "3"]
    return teacher, write_recipe(target, corpus, PAPER_WINDOW, epochs=8)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corpus", default="synthetic", help="synthetic, or a folder of $SERTOOL_DATA/corpora"
    )
    parser.add_argument("--folder", type=Path, help="where everything goes [default: demo/CORPUS]")
    options = parser.parse_args()
    folder: Path = options.folder or Path("demo") / options.corpus
    started = time.monotonic()

    if options.corpus == "synthetic":
        teacher, recipe = prepare_synthetic(folder)
    else:
        teacher, recipe = prepare_real(folder, options.corpus, real_data(options.corpus))
    target = recipe.parent
    run("sertool", "embed", target / "manifest.csv", *teacher, "-o", target / "embeddings")
    run(
        "sertool", "graph", target / "embeddings", "--manifest", target / "manifest.csv",
        "--split", target / "split.json", *GRAPH, "-o", target / "graph",
    )  # fmt: skip
    run("sertool", "train", recipe, "-o", folder / "base")
    run(
        "sertool", "train", recipe, "-o", folder / "graph", "--set", f"neighbours.graph={target / 'graph'}",
        *NEIGHBOURS,
    )  # fmt: skip
    for name in ("base", "graph"):
        run("sertool", "evaluate", folder / name)
    artifact = folder / "emotion.onnx"
    run("sertool", "export", folder / "graph", "--format", "onnx", "--precision", "int8", "-o", artifact)
    clip, truth = held_out_clip(folder / "graph")
    run("ser-edge", "file", artifact, clip)
    report(folder, artifact, truth, time.monotonic() - started)


def real_data(corpus: str) -> Path:
    """Return the folder that SERTOOL_DATA names, or stop with one line."""
    data = os.environ.get("SERTOOL_DATA")
    if not data:
        sys.exit(
            f"demo: CORPUS={corpus} needs SERTOOL_DATA to name a folder with corpora/{corpus} and encoders/"
        )
    if not (Path(data) / "corpora" / corpus).is_dir():
        known = sorted(path.name for path in Path(data).glob("corpora/*"))
        sys.exit(f"demo: no {Path(data) / 'corpora' / corpus}; there: {', '.join(known) or 'nothing'}")
    return Path(data)


def held_out_clip(run_folder: Path) -> tuple[str, str]:
    """Return the first test item that the run got right, and its label."""
    import csv

    with (run_folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = next((row for row in rows if row["truth"] == row["predicted"]), rows[0])
    return chosen["file"], chosen["truth"]


def report(folder: Path, artifact: Path, truth: str, seconds: float) -> None:
    """Print what came out, where it is, and what to try next."""
    table = Table(title="ResNet-9 on speakers it never heard")
    for column in ("training", "UAR", "95 % interval over speakers", "accuracy", "clips"):
        table.add_column(column)
    classes = 0
    for name, title in (("base", "cross entropy alone"), ("graph", "with the teacher's graph")):
        metrics = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))["test"]
        classes = len(metrics["labels"])
        low, high = metrics["uar_interval"]
        table.add_row(
            title, f"{metrics['uar']:.1%}", f"{low:.1%} to {high:.1%}", f"{metrics['accuracy']:.1%}",
            str(metrics["items"]),
        )  # fmt: skip
    table.add_row("guessing", f"{1 / classes:.1%}", "", "", "")
    CONSOLE.print()
    CONSOLE.print(table)
    CONSOLE.print(f"The clip above is labelled {truth!r}; its speaker took no part in any training.")
    CONSOLE.print(
        f"Model for the device: {artifact} ({artifact.stat().st_size / 1e6:.1f} MB), made in {seconds:.0f} s."
    )
    CONSOLE.print(
        "Few test speakers and a short training: this shows that the chain works, not which variant is better."
    )
    CONSOLE.print("\nTry next:")
    CONSOLE.print(f"  {BIN}/ser-edge listen {artifact}          your own voice, live", soft_wrap=True)
    CONSOLE.print(f"  {BIN}/ser-edge info {artifact}            what the file says of itself", soft_wrap=True)
    CONSOLE.print("  README.md, 'Train on your own recordings'")


if __name__ == "__main__":
    main()
