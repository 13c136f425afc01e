"""What listening costs an ARM processor: instructions for each second of audio, in silence and in speech.

    python tools/count_instructions.py model.onnx ...            # count
    python tools/count_instructions.py --check                   # networks made for it, against the budget
    python tools/count_instructions.py --update                  # set the budget to what is counted now

An emulated board (``tools/arm_root.py``) counts the same to the last instruction in every run and under any load, so
that a change which costs a percent more is seen where no clock would show it. How long a processor takes for them it
does not tell: one of a Raspberry Pi 5 does one to two a cycle. A processor without 8-bit dot products (Cortex-A72,
Raspberry Pi 4) needs about twice as many for the same network.

The budget is ``tools/instruction_budget.json``. With it stand the versions that it was counted with: a count beyond the
budget that came with a new version of one of them asks for no repair here, but for a decision whether to take it.

Needs qemu-user as of Debian 12, and gcc.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arm_root import PROCESSORS, ArmRoot, emulated_environment
from quick_run import quick_run

from sertool.files import write_json

BUDGET = Path(__file__).with_name("instruction_budget.json")
PLUGIN = Path(__file__).with_suffix(".c")

TOLERANCE = 0.03
"""Share by which a count may exceed the budget, or fall below it before the budget asks to be lowered."""

WINDOW_SAMPLES = 95744
FORMS = {"resnet9": ("window.onnx", "stream.onnx"), "cnn6": ("stream.onnx",)}
"""The files that the budget is for: form and format, by network."""

# Half a second more than counted, so that all is loaded and compiled; speech then gets its first score, too.
GUEST = """
import json, os, sys
import numpy as np
from importlib.metadata import version
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session

BLOCK, RATE, WARM_UP = 512, 16000, 1.5

def mark(number):
    try:
        os.getpgid(0x5EC0000 + number)
    except ProcessLookupError:
        pass

def listen(recognizer, samples, counted):
    session = Session(recognizer)
    blocks = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    beginning = round(WARM_UP * RATE / BLOCK)
    for block in blocks[:beginning]:
        session.push(block)
    scored = session.windows
    mark(0)
    for block in blocks[beginning:]:
        session.push(block)
    mark(counted)
    return session.windows - scored

seconds = float(sys.argv[2])
recognizer = Recognizer(sys.argv[1])
time = np.arange(round((seconds + WARM_UP) * RATE)) / RATE
room = np.random.default_rng(0).normal(0, 0.0007, len(time)).astype(np.float32)
voice = np.maximum(0, np.sin(2 * np.pi * 2 * time)) * np.sin(2 * np.pi * 150 * time)
assert listen(recognizer, room, 1) == 0
scores = listen(recognizer, (0.2 * voice).astype(np.float32) + room, 2)
print(json.dumps({"scores": scores, "numpy": version("numpy"), "onnxruntime": version("onnxruntime")}))
"""


class Counter:
    """Counts what listening costs on an emulated board.

    Args:
        root: the board's programs.
        plugin: qemu's plugin, compiled.
    """

    def __init__(self, root: ArmRoot, plugin: Path) -> None:
        self._root = root
        self._plugin = plugin
        self.versions: dict[str, str] = {}

    def count(self, model: Path, cpu: str, seconds: float = 2.0) -> dict[str, int]:
        """Return instructions for a second of ``silence`` and of ``speech``, and ``scores`` a second of speech."""
        command = self._root.command(
            "python", "-c", GUEST, model, str(seconds), cpu=cpu, qemu=["-plugin", self._plugin]
        )
        done = subprocess.run(command, env=emulated_environment(), capture_output=True, text=True, check=False)
        marks = {int(number): int(count) for number, count in re.findall(r"^MARK (\d+) (\d+)$", done.stderr, re.M)}
        if done.returncode or not {1, 2} <= marks.keys():
            raise RuntimeError(f"{model} on {cpu}: counting ended with {done.returncode}\n{done.stderr}")
        found = json.loads(done.stdout)
        scores = found.pop("scores")
        self.versions = found
        return {
            "silence": round(marks[1] / seconds),
            "speech": round(marks[2] / seconds),
            "scores": round(scores / seconds),
        }


def compile_plugin(folder: Path) -> Path:
    """Compile qemu's plugin into a folder and return it."""
    plugin = folder / "count_instructions.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, PLUGIN], check=True)
    return plugin


def make_models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Give the name and the file of each network of the budget: of the product's size, trained for a moment."""
    for network, files in FORMS.items():
        corpus = folder / network
        corpus.mkdir()
        run = quick_run(corpus, network, WINDOW_SAMPLES, takes=1, epochs=4)
        for file in files:
            model = corpus / file
            command: list[str | Path] = [sys.executable, "-m", "sertool", "export", run, "--force", "-o", model]
            options = ["--calibration-clips", "6", "--form", model.stem]
            subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
            yield f"{network} {file}", model


def off_budget(counts: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """Return a line for each count that is further from the budget than :data:`TOLERANCE`, or that only one has."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    allowed = budget["counts"]
    lines = [f"{name}: only in one of budget and counts" for name in sorted(counts.keys() ^ allowed.keys())]
    for name in sorted(counts.keys() & allowed.keys()):
        for state in ("silence", "speech"):
            change = counts[name][state] / allowed[name][state] - 1
            if abs(change) > TOLERANCE:
                lines.append(f"{name}: {counts[name][state]:,} in {state}, {change:+.1%} of the budget")
    if lines:
        lines.append(f"counted with {versions}, the budget with {budget['versions']}")
        lines.append("if that is meant: python tools/count_instructions.py --update")
    return lines


def count_all(models: Iterable[tuple[str, Path]], root: ArmRoot) -> tuple[dict[str, Any], dict[str, str]]:
    """Count every model on every processor, print each as it is there, and return them with the versions counted."""
    counts: dict[str, Any] = {}
    print(f"{'instructions a second, in millions':<44} {'silence':>8} {'speech':>8} {'scores':>7}")
    with tempfile.TemporaryDirectory() as name:
        counter = Counter(root, compile_plugin(Path(name)))
        for model, path in models:
            for cpu in PROCESSORS:
                found = counts[f"{model} {cpu}"] = counter.count(path, cpu)
                silence, speech = found["silence"] / 1e6, found["speech"] / 1e6
                print(f"{model + ' ' + cpu:<44} {silence:8.2f} {speech:8.1f} {found['scores']:7}", flush=True)
    return counts, counter.versions


def main() -> None:
    """Count, and compare or set the budget."""
    parser = argparse.ArgumentParser(description="Count the instructions that listening costs an ARM processor.")
    parser.add_argument("models", metavar="FILE", nargs="*", type=Path, help="model files")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit code 1 where a count is off the budget")
    action.add_argument("--update", action="store_true", help="set the budget to what is counted now")
    arguments = parser.parse_args()
    if bool(arguments.models) == (arguments.check or arguments.update):
        parser.error("name model files, or --check, or --update")
    try:
        with tempfile.TemporaryDirectory() as name, ArmRoot() as root:
            given = [(path.name, path.absolute()) for path in arguments.models]
            counts, versions = count_all(given or make_models(Path(name)), root)
    except RuntimeError as error:
        sys.exit(f"count_instructions: {error}")
    if arguments.update:
        write_json(BUDGET, {"versions": versions, "counts": counts})
    elif arguments.check and (lines := off_budget(counts, versions)):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
