"""The whole job in one go: corpus, teacher, graph, student with and without it, evaluation, export, recognition.

Every step is an ordinary command of ``sertool`` or ``ser-edge``, printed before it runs. Started again, the commands
take up what they find: finished trainings and embeddings are not computed twice. Without a corpus the demo speaks one
with espeak-ng in two languages, and an earlier run of our own on the first language is the teacher. With SERTOOL_DATA
it takes a real corpus and the Whisper-base encoder.
"""

from __future__ import annotations

import argparse
import csv
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
licence = "{licence}"
window_samples = {window_samples}

[training]
epochs = 8
decay_epochs = 1
"""
# Synthetic sentences last about two seconds: 160 frames (2.6 s) instead of the paper's 373 save half the time.
SYNTHETIC_WINDOW = 41216
PAPER_WINDOW = 95744
GRAPH = "--centre --threshold 0.5 --neighbours 6"
NEIGHBOURS = "--set neighbours.count=6 --set neighbours.alpha=0.1 --set neighbours.mode=bank"


def run(command: str, **options: str | Path) -> None:
    """Print a command and run it; stop the demo with its exit code when it fails.

    Args:
        command: its words, as in a shell.
        options: added as ``--name value``.
    """
    words = shlex.split(command)
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    CONSOLE.print(f"\n[bold]$ {shlex.join(words)}[/bold]", soft_wrap=True)
    try:
        code = subprocess.run([BIN / words[0], *words[1:]], check=False).returncode
    except KeyboardInterrupt:  # the command got it too and has said so in a line
        code = 130
    if code:
        sys.exit(code)


def write_recipe(folder: Path, corpus: str) -> Path:
    """Write the demo's recipe: the paper's settings, but a shorter training."""
    synthetic = corpus == "synthetic"
    text = RECIPE.format(
        folder=folder,
        corpus=corpus,
        # Speech that nobody spoke puts no condition on the weights; a corpus' own licence is known to sertool.
        licence="Apache-2.0" if synthetic else "",
        window_samples=SYNTHETIC_WINDOW if synthetic else PAPER_WINDOW,
    )
    path = folder / "recipe.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def prepare_synthetic(folder: Path) -> Path:
    """Speak a source and a target corpus, train the teacher on the source, embed the target; return its folder."""
    for name, language in (("source", "en"), ("target", "it")):
        part = folder / name
        manifest = part / "manifest.csv"
        run(f"sertool corpus make synthetic --language {language}", root=part / "audio", output=manifest)
        run(f"sertool split make {manifest} --protocol kfold:4", output=part / "split.json")
    run(f"sertool train {write_recipe(folder / 'source', 'synthetic')}", output=folder / "teacher")
    run(f"sertool embed {manifest}", teacher=folder / "teacher", output=part / "embeddings")
    return part


def prepare_real(folder: Path, corpus: str, data: Path) -> Path:
    """Take a real corpus and let the Whisper encoder embed it; return the target's folder."""
    target = folder / "target"
    manifest = target / "manifest.csv"
    encoder = data / "encoders" / "whisper-base-encoder"
    run(f"sertool corpus make {corpus}", root=data / "corpora" / corpus, output=manifest)
    run(f"sertool split make {manifest} --protocol kfold:5", output=target / "split.json")
    run(f"sertool embed {manifest} --layer 3", teacher=encoder, output=target / "embeddings")
    return target


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", default="synthetic", help="synthetic, or a folder of $SERTOOL_DATA/corpora")
    parser.add_argument("--folder", type=Path, help="where everything goes [default: demo/CORPUS]")
    options = parser.parse_args()
    corpus, folder = options.corpus, options.folder or Path("demo") / options.corpus
    started = time.monotonic()

    target = prepare_synthetic(folder) if corpus == "synthetic" else prepare_real(folder, corpus, real_data(corpus))
    recipe, graph = write_recipe(target, corpus), target / "graph"
    run(
        f"sertool graph {target / 'embeddings'} {GRAPH}",
        manifest=target / "manifest.csv",
        split=target / "split.json",
        output=graph,
    )
    run(f"sertool train {recipe}", output=folder / "base")
    run(f"sertool train {recipe} --set neighbours.graph={graph} {NEIGHBOURS}", output=folder / "graph")
    run(f"sertool evaluate {folder / 'base'}")
    run(f"sertool evaluate {folder / 'graph'}")
    artifact = folder / "emotion.onnx"
    run(f"sertool export {folder / 'graph'} --format onnx --precision int8", output=artifact)
    clip, truth = held_out_clip(folder / "graph")
    run(f"ser-edge file {artifact} {shlex.quote(clip)}")
    report(folder, artifact, truth, time.monotonic() - started)


def real_data(corpus: str) -> Path:
    """Return the folder that SERTOOL_DATA names, or stop with one line."""
    data = os.environ.get("SERTOOL_DATA")
    if not data:
        sys.exit(f"demo: CORPUS={corpus} needs SERTOOL_DATA to name a folder with corpora/{corpus} and encoders/")
    if not (Path(data) / "corpora" / corpus).is_dir():
        known = sorted(path.name for path in Path(data).glob("corpora/*"))
        sys.exit(f"demo: no {Path(data) / 'corpora' / corpus}; there: {', '.join(known) or 'nothing'}")
    return Path(data)


def held_out_clip(run_folder: Path) -> tuple[str, str]:
    """Return the first test item and its label, whether the run got it right or not."""
    with (run_folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    return first["file"], first["truth"]


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
        uar, interval = f"{metrics['uar']:.1%}", f"{low:.1%} to {high:.1%}"
        table.add_row(title, uar, interval, f"{metrics['accuracy']:.1%}", str(metrics["items"]))
    table.add_row("guessing", f"{1 / classes:.1%}", "", "", "")
    CONSOLE.print()
    CONSOLE.print(table)
    CONSOLE.print(f"The clip above is meant as {truth!r}; its speaker took no part in any training.")
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
