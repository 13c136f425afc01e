"""What knowing the speaker is worth: UAR on unknown speakers against the seconds of them that were heard before.

For every test clip, other clips of its speaker are heard first, in random order, until so many seconds have gone by;
then the clip is heard with the statistics that run on from there (``normalization.kind = "running"``), or by constants
measured on them (``normalization.personal``, ``ser-edge calibrate``; less than 5 s leave the usual ones). ``neutral``
hears neutral clips alone, as of a person who is asked to speak for a while; ``mixed`` any; ``another`` as many seconds
of the fold's other test speakers (neutral ones where constants are measured), which is what a device suffers when the
speaker changes (of no use where a fold tests one).

    python tools/adaptation_curve.py runs/emodb
    python tools/adaptation_curve.py runs/emodb --seconds 0 10 30 60 --orders 3 --memory 20 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge_runtime.calibrate import LEAST_S, constants_of, sums_of
from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray, RunningNormalizer
from sertool.batches import padded
from sertool.corpora.manifest import Clip
from sertool.features import ClipFrames, log_mel_clips
from sertool.metrics import confusion_matrix, unweighted_average_recall
from sertool.networks import predict_beginnings, time_reach
from sertool.run import Run, load_folds

KINDS = ("mixed", "neutral", "another")


def main() -> None:
    """Measure the curves and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "run", type=Path, help="a run, or the folder above its folds, with statistics that run on or personal constants"
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[0, 5, 10, 30, 60], help="heard before each clip")
    parser.add_argument("--orders", type=int, default=3, help="random orders; their mean is given")
    parser.add_argument("--memory", type=float, help="seconds that what was heard counts for at most")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    runs = [with_memory(run, arguments.memory) for run in load_folds(arguments.run)]
    normalization = runs[0].normalization
    if not (normalization.runs or normalization.personal):
        raise UsageError(
            f"{arguments.run}: knows no speaker; train with normalization.kind = 'running' or normalization.personal"
        )
    curves: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    wanted = [(kind, seconds) for kind in KINDS for seconds in arguments.seconds]
    for kind, seconds in track(wanted, console=Console(stderr=True), transient=True):
        found = [measure(runs, kind, seconds, order) for order in range(arguments.orders if seconds else 1)]
        curves[kind][f"{seconds:g}"] = float(np.mean(found))
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "orders": arguments.orders, "uar": curves}))
        return
    table = Table("heard before", *(f"{seconds:g} s" for seconds in arguments.seconds))
    for kind, curve in curves.items():
        table.add_row(kind, *(f"{uar:.1%}" for uar in curve.values()))
    Console().print(table)


def with_memory(run: Run, seconds: float | None) -> Run:
    """Return a run whose statistics remember so many seconds; as it was trained when None."""
    if seconds is None:
        return run
    frames = round(seconds * run.front_end.frame_rate)
    return replace(run, student=replace(run.student, normalization=replace(run.normalization, memory_frames=frames)))


def measure(runs: list[Run], kind: str, seconds: float, order: int) -> float:
    """Return the UAR pooled over folds where every clip is heard after so many seconds of such speech."""
    truth, answered = [], []
    for run in runs:
        network = run.network()
        clips = run.clips("test")
        row_of = {clip.key: row for row, clip in enumerate(run.manifest.clips)}
        frames = log_mel_clips(run.manifest, run.front_end, time_reach(network).stride).take(
            [row_of[clip.key] for clip in clips]
        )
        hear = heard if run.normalization.runs else calibrated
        windows, lengths = padded(
            list(hear(run, frames, kind, seconds, order)), run.front_end.frames(run.window_samples)
        )
        answered.append(predict_beginnings(network, windows, lengths).argmax(axis=1))
        truth.append(np.array([run.labels.index(clip.label) for clip in clips]))
    labels = len(runs[0].labels)
    return unweighted_average_recall(confusion_matrix(np.concatenate(truth), np.concatenate(answered), labels))


def heard(run: Run, frames: ClipFrames, kind: str, seconds: float, order: int) -> Iterator[FloatArray]:
    """Give each test clip's window, normalised after what was heard before it."""
    random = np.random.default_rng([order, round(seconds * 10)])
    wanted = seconds * run.front_end.frame_rate
    longest = run.front_end.frames(run.window_samples)
    for row in range(len(frames)):
        normalizer = RunningNormalizer(run.normalization)
        before = candidates(run.clips("test"), row, calm=kind == "neutral", another=kind == "another")
        for other in random.permutation(before):
            if normalizer.frames >= wanted:
                break
            normalizer.forget()
            normalizer.push(frames[other])
        normalizer.forget()
        yield normalizer.push(frames[row])[:longest]


def calibrated(run: Run, frames: ClipFrames, kind: str, seconds: float, order: int) -> Iterator[FloatArray]:
    """Give each test clip's window, normalised by constants of so much speech."""
    random = np.random.default_rng([order, round(seconds * 10)])
    wanted, least = (round(each * run.front_end.frame_rate) for each in (seconds, LEAST_S))
    longest = run.front_end.frames(run.window_samples)
    for row in range(len(frames)):
        others = random.permutation(
            candidates(run.clips("test"), row, calm=kind != "mixed", another=kind == "another")
        ).tolist()
        before = np.concatenate([frames[row][:0], *(frames[other] for other in others)])[:wanted]
        known = len(before) >= least
        constants = constants_of(sums_of(before), len(before)) if known else run.normalization
        yield constants.apply(frames[row])[:longest]


def candidates(clips: Sequence[Clip], row: int, *, calm: bool, another: bool) -> list[int]:
    """Return the clips that may be heard before one: the speaker's others, or those of another."""
    return [
        other
        for other, candidate in enumerate(clips)
        if other != row
        and (candidate.speaker != clips[row].speaker) == another
        and (candidate.label == "neutral" or not calm)
    ]


if __name__ == "__main__":
    try:
        main()
    except SerError as error:
        sys.exit(f"adaptation_curve: {error}")
