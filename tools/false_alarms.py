"""How often neutral speech passes for an emotion while ``ser-edge`` listens, by hour, and how much is still named.

Every clip of the manifest is heard as a stretch of speech of its own, through the gate and at every hop, by the model's
own thresholds; clips that the model was trained on say nothing about others. With ``--calibrated`` up to half of each
speaker's neutral clips, 30 s at most, calibrate the device to the speaker and are not counted.

    python tools/false_alarms.py model.onnx nemo.csv
    python tools/false_alarms.py emodb ravdess.csv --rename calm=neutral --gain 20 --json
    python tools/false_alarms.py emodb ravdess.csv --rename calm=neutral --calibrated
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge_runtime.calibrate import ENOUGH_S, LEAST_S, Calibrator
from edge_runtime.errors import SerError, UsageError
from edge_runtime.frontend import FloatArray
from edge_runtime.installed import find_model
from edge_runtime.recognizer import Recognizer
from edge_runtime.session import Session
from sertool.cli.corpus import parse_renames
from sertool.corpora.adapters import relabelled
from sertool.corpora.manifest import Clip, load_manifest

CALM = "neutral"
SILENT = (CALM, "uncertain", "no_speech")
"""Answers that are no alarm."""

COUNTS = ("clips", "answered", "flickered", "right")


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a model file, or the name of an installed model")
    parser.add_argument("manifest", type=Path, help="as made by: sertool corpus make; one with the label neutral")
    parser.add_argument("--rename", metavar="OLD=NEW", action="append", default=[], help="rename a label")
    parser.add_argument("--calibrated", action="store_true", help="after ser-edge calibrate on each speaker")
    parser.add_argument("--gain", type=float, default=0.0, metavar="DB", help="make the clips louder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    recognizer = Recognizer(find_model(arguments.model))
    clips = relabelled(list(load_manifest(arguments.manifest).clips), parse_renames(arguments.rename), [])
    if CALM not in {clip.label for clip in clips}:
        raise UsageError(f"{arguments.manifest}: no clip is labelled {CALM!r}; rename one: --rename OLD={CALM}")
    found = count(recognizer, clips, arguments.calibrated, arguments.gain)
    print(json.dumps(found, indent=1)) if arguments.json else show(found)


def count(recognizer: Recognizer, clips: list[Clip], calibrated: bool, gain: float) -> dict[str, Any]:
    """Return what was answered, by label of the clips.

    Returns:
        by label: ``clips``, ``hours``, ``answered`` (clips whose answer as a whole named an emotion), ``flickered``
        (clips in which any score named one), ``right`` (clips whose answer was their label).
    """
    rate = recognizer.artifact.front_end.sample_rate
    tally: dict[str, Counter[str]] = {}
    known, used = calibrate(recognizer, clips, gain) if calibrated else ({}, set())
    counted_clips = [clip for clip in clips if clip.key not in used]
    for clip in track(counted_clips, console=Console(stderr=True), transient=True):
        samples = read(clip, gain)
        session = Session(known.get(clip.speaker, recognizer))
        events = session.push(samples) + session.finish()
        answers = {event.label for event in events if event.kind == "end"}
        counted = tally.setdefault(clip.label, Counter())
        counted["clips"] += 1
        counted["samples"] += len(samples)
        counted["answered"] += bool(answers - set(SILENT))
        counted["flickered"] += bool({event.label for event in events} - set(SILENT))
        counted["right"] += clip.label in answers
    return {
        label: {"hours": counted["samples"] / rate / 3600, **{key: counted[key] for key in COUNTS}}
        for label, counted in sorted(tally.items())
    }


def calibrate(recognizer: Recognizer, clips: list[Clip], gain: float) -> tuple[dict[str, Recognizer], set[str]]:
    """Return the model calibrated to each speaker, and the keys of the clips that were listened to for it."""
    known, used = {}, set()
    for speaker in sorted({clip.speaker for clip in clips}):
        calm = [clip for clip in clips if clip.speaker == speaker and clip.label == CALM]
        calibrator = Calibrator(recognizer)
        for clip in calm[: len(calm) // 2]:
            if calibrator.seconds < ENOUGH_S:
                calibrator.push(read(clip, gain))
                calibrator.end()
                used.add(clip.key)
        if calibrator.seconds >= LEAST_S:
            known[speaker] = recognizer.calibrated(calibrator.calibration(speaker))
    return known, used


def read(clip: Clip, gain: float) -> FloatArray:
    """Return a clip's samples as a microphone turned up by ``gain`` dB gives them, clipped at full scale."""
    samples: FloatArray = clip.read() * np.float32(10 ** (gain / 20))
    return samples.clip(-1, 1)


def show(found: dict[str, Any]) -> None:
    """Print alarms by hour of neutral speech, and what of the emotions was named."""
    calm = found[CALM]
    minutes = 60 * calm["hours"]
    print(f"{calm['clips']} clips of neutral speech, {minutes:.1f} minutes")
    for key, what in (("answered", "answers for a whole stretch"), ("flickered", "stretches with any such score")):
        print(f"  {what} that named an emotion: {calm[key]}, {calm[key] / calm['hours']:.1f} an hour")
    table = Table("label", "clips", "named as anything", "named rightly")
    for label, counted in found.items():
        shares = (f"{counted[key] / counted['clips']:.1%}" for key in ("answered", "right"))
        table.add_row(label, str(counted["clips"]), *shares)
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except SerError as error:
        sys.exit(f"false_alarms: {error}")
