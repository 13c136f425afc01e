"""What inference and listening cost an ARM processor, in instructions.

    python tools/count_instructions.py model.onnx ...            # what listening with these files costs
    python tools/count_instructions.py --check                   # networks made for it, against the budget
    python tools/count_instructions.py --check --networks resnet9                  # as the tests do
    python tools/count_instructions.py --update                  # set the budget to what is counted now

An emulated board (``tools/arm_root.py``) counts the same to the last instruction in every run and under any load, so
that a change which costs a percent more is seen where no clock would show it. How long a processor takes for them it
does not tell: one of a Raspberry Pi 5 does one to two a cycle. A processor without 8-bit dot products (Cortex-A72,
Raspberry Pi 4) needs two to three times as many for the same 8-bit network.

The budget is ``tools/instruction_budget.json``: of every network, library, precision and processor a whole window, a
hop of the stream and one of two strides, the head over a window of features included (``calls``); and, for a few files,
a second of audio from samples to events (``listening``, all of it whichever networks are named). With it stand the
versions that it was counted with: a count beyond the budget that came with a new version of one of them asks for no
repair here, but for a decision whether to take it.

Needs qemu-user as of Debian 12, and gcc.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from arm_root import PROCESSORS, ArmRoot, emulated_environment
from quick_run import quick_run
from random_networks import FRAMES, KINDS, random_network, write_files

from sertool.files import write_json
from sertool.networks import NETWORKS

BUDGET = Path(__file__).with_name("instruction_budget.json")
PLUGIN = Path(__file__).with_suffix(".c")

TOLERANCE = 0.03
"""Share by which a count may exceed the budget, or fall below it before the budget asks to be lowered."""

WINDOW_SAMPLES = 95744
LISTENING = {"resnet9": ("window.onnx", "stream.onnx"), "cnn6": ("stream.onnx",)}
"""The files whose listening has a budget: form and format, by network."""

QUICK = ("resnet9",)
"""The networks whose calls the tests count, in every library, precision and form: what a change to the runtime, the
exporter or a library costs shows there. MobileNet-15 takes the emulator as long again, the other two ten to thirty
times."""

MARK = """
import json, os, sys
import numpy as np
from importlib.metadata import version

def mark(number):
    try:
        os.getpgid(0x5EC0000 + number)
    except ProcessLookupError:
        pass
"""

# Each call is counted at its second time, when all is loaded, compiled and of its size.
CALLS = (
    MARK
    + """
from pathlib import Path
from edge_runtime.backends import load_backend

frames, *files = sys.argv[1:]
log_mel = np.random.default_rng(0).normal(size=(int(frames), 64)).astype(np.float32)
number = 0

def count(call):
    global number
    call()
    mark(0)
    call()
    number += 1
    mark(number)

def hop(strides):
    new, _ = stream.advance(log_mel[: strides * stream.stride], states)
    return stream.classify(np.concatenate([features[:, new.shape[1] :], new], axis=1))

for window_file, stream_file in zip(files[::2], files[1::2]):
    window = load_backend(Path(window_file))
    count(lambda: window.predict(log_mel[None]))
    stream = load_backend(Path(stream_file))
    new, states = stream.advance(log_mel[: stream.stride], stream.start())
    features = np.repeat(new, len(log_mel) // stream.stride, axis=1)
    for strides in (1, 2):
        count(lambda: hop(strides))
print(json.dumps({name: version(name) for name in ("numpy", "onnxruntime", "ai-edge-litert")}))
"""
)

# Half a second more than counted, so that all is loaded and compiled; speech then gets its first score, too.
LISTEN = (
    MARK
    + """
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session

BLOCK, RATE, WARM_UP = 512, 16000, 1.5

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
print(json.dumps({"scores": scores}))
"""
)


class Counter:
    """Counts on an emulated board.

    Args:
        root: the board's programs.
        plugin: qemu's plugin, compiled.

    Attributes:
        versions: of the board's libraries, once a network's calls were counted.
    """

    def __init__(self, root: ArmRoot, plugin: Path) -> None:
        self._root = root
        self._plugin = plugin
        self.versions: dict[str, str] = {}

    def calls(self, files: Iterable[tuple[Path, Path]], cpu: str) -> list[dict[str, int]]:
        """Return the instructions of a ``window``, a ``hop`` and ``two_hops`` for each pair of window and stream."""
        marks, self.versions = self._run(CALLS, [str(FRAMES), *(path for pair in files for path in pair)], cpu)
        counts = [marks[number] for number in sorted(marks.keys() - {0})]
        return [
            {"window": window, "hop": hop, "two_hops": two_hops}
            for window, hop, two_hops in zip(*[iter(counts)] * 3, strict=True)
        ]

    def listening(self, model: Path, cpu: str, seconds: float = 2.0) -> dict[str, int]:
        """Return instructions for a second of ``silence`` and of ``speech``, and ``scores`` a second of speech."""
        marks, found = self._run(LISTEN, [model, str(seconds)], cpu)
        return {
            "silence": round(marks[1] / seconds),
            "speech": round(marks[2] / seconds),
            "scores": round(found["scores"] / seconds),
        }

    def _run(self, guest: str, arguments: Iterable[str | Path], cpu: str) -> tuple[dict[int, int], dict[str, Any]]:
        """Return the instructions up to each mark since the mark before, and what the program printed."""
        command = self._root.command("python", "-c", guest, *arguments, cpu=cpu, qemu=["-plugin", self._plugin])
        done = subprocess.run(command, env=emulated_environment(), capture_output=True, text=True, check=False)
        marks = {int(number): int(count) for number, count in re.findall(r"^MARK (\d+) (\d+)$", done.stderr, re.M)}
        if done.returncode or not marks:
            raise RuntimeError(
                f"{' '.join(map(str, arguments))} on {cpu}: counting ended with {done.returncode}\n{done.stderr}"
            )
        return marks, json.loads(done.stdout)


def compile_plugin(folder: Path) -> Path:
    """Compile qemu's plugin into a folder and return it."""
    plugin = folder / "count_instructions.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, PLUGIN], check=True)
    return plugin


def make_models(folder: Path) -> Iterator[tuple[str, Path]]:
    """Give the name and the file of each model that is listened with: of the product's size, trained for a moment."""
    for network, files in LISTENING.items():
        corpus = folder / network
        corpus.mkdir()
        quick_run(corpus, network, WINDOW_SAMPLES, takes=1, epochs=1)
        for file in files:
            model = corpus / file
            options: list[str | Path] = ["--force", "--calibration-clips", "2", "--form", model.stem, "-o", model]
            command = [sys.executable, "-m", "sertool", "export", corpus / "run", *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            yield f"{network} {file}", model


def count_listening(models: Iterable[tuple[str, Path]], counter: Counter) -> dict[str, dict[str, int]]:
    """Count a second of audio with every model on every processor, and print each as it is there."""
    counts = {}
    print(f"{'instructions a second of audio, in millions':<44} {'silence':>8} {'speech':>8} {'scores':>8}")
    for model, path in models:
        for cpu in PROCESSORS:
            found = counts[f"{model} {cpu}"] = counter.listening(path, cpu)
            silence, speech = found["silence"] / 1e6, found["speech"] / 1e6
            print(f"{model + ' ' + cpu:<44} {silence:8.2f} {speech:8.1f} {found['scores']:8}", flush=True)
    return counts


def count_calls(networks: Iterable[str], counter: Counter) -> dict[str, dict[str, int]]:
    """Count the calls of every network in every library and precision on every processor, and print them."""
    counts = {}
    print(f"{'instructions a call, in millions':<44} {'window':>8} {'hop':>8} {'two hops':>8} {'window / hop':>13}")
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(random_network(network), Path(folder))
            for cpu in PROCESSORS:
                for kind, found in zip(KINDS, counter.calls((files[kind] for kind in KINDS), cpu), strict=True):
                    name = f"{network} {kind} {cpu}"
                    counts[name] = found
                    millions = " ".join(f"{count / 1e6:8.2f}" for count in found.values())
                    print(f"{name:<44} {millions} {found['window'] / found['hop']:13.1f}", flush=True)
    return counts


def count_all(networks: Sequence[str], root: ArmRoot) -> dict[str, Any]:
    """Return ``versions``, the ``calls`` of some networks and all of ``listening``, as the budget holds them."""
    with tempfile.TemporaryDirectory() as name:
        counter = Counter(root, compile_plugin(Path(name)))
        calls = count_calls(networks, counter)
        listening = count_listening(make_models(Path(name)), counter)
    return {"versions": counter.versions, "calls": calls, "listening": listening}


def off_budget(counted: dict[str, Any], networks: Sequence[str] = tuple(NETWORKS)) -> list[str]:
    """Return a line for each count that is further from the budget than :data:`TOLERANCE`, or that only one has.

    Args:
        counted: what :func:`count_all` returns.
        networks: those whose calls were counted.
    """
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    calls = {name: count for name, count in budget["calls"].items() if name.split()[0] in networks}
    lines = []
    for section, allowed in {"calls": calls, "listening": budget["listening"]}.items():
        counts = counted[section]
        lines += [f"{name}: only in one of budget and counts" for name in sorted(counts.keys() ^ allowed.keys())]
        for name in sorted(counts.keys() & allowed.keys()):
            for what in counts[name].keys() - {"scores"}:
                change = counts[name][what] / allowed[name][what] - 1
                if abs(change) > TOLERANCE:
                    lines.append(f"{name}: {what} takes {counts[name][what]:,}, {change:+.1%} of the budget")
    if lines:
        lines.append(f"counted with {counted['versions']}, the budget with {budget['versions']}")
        lines.append("if that is meant: python tools/count_instructions.py --update")
    return lines


def main() -> None:
    """Count, and compare or set the budget."""
    parser = argparse.ArgumentParser(description="Count the instructions that inference costs an ARM processor.")
    parser.add_argument("models", metavar="FILE", nargs="*", type=Path, help="model files to listen with")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit code 1 where a count is off the budget")
    action.add_argument("--update", action="store_true", help="set the budget to what is counted now")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), help="whose calls; all unless given")
    arguments = parser.parse_args()
    if bool(arguments.models) == (arguments.check or arguments.update):
        parser.error("name model files, or --check, or --update")
    networks = arguments.networks or list(NETWORKS)
    try:
        with tempfile.TemporaryDirectory() as name, ArmRoot() as root:
            if arguments.models:
                models = [(path.name, path.absolute()) for path in arguments.models]
                count_listening(models, Counter(root, compile_plugin(Path(name))))
                return
            counted = count_all(networks, root)
    except RuntimeError as error:
        sys.exit(f"count_instructions: {error}")
    if arguments.update:
        write_json(BUDGET, _updated(counted, networks))
    elif lines := off_budget(counted, networks):
        sys.exit("\n".join(lines))


def _updated(counted: dict[str, Any], networks: Sequence[str]) -> dict[str, Any]:
    """Return the budget with the calls of some networks in place of theirs, and all else as counted."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {"calls": {}}
    kept = {name: count for name, count in budget["calls"].items() if name.split()[0] not in networks}
    return counted | {"calls": kept | counted["calls"]}


if __name__ == "__main__":
    main()
