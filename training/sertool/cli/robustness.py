"""``sertool robustness``: UAR under noise, in rooms and over channels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sertool.cli.compare import range_of_percents
from sertool.cli.console import OUTPUT, print_json, print_status, progress_bar
from sertool.cli.evaluate import describe_folds

NOTES = """\
Differences from clean are in percentage points. Intervals draw other speakers,
the same for both sides of a difference; with fewer than ten they are rough.
Rooms and music are made by formula; see sertool robustness --help."""


def robustness(
    run: Annotated[Path, typer.Argument(help="A run folder, or the folder above the folds of one.")],
    part: Annotated[str, typer.Option(help="Part of the split: test, validation or train.")] = "test",
    conditions: Annotated[
        str, typer.Option(help="Groups or names of conditions, joined by commas; without it, all.")
    ] = "",
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrated",
            help="Hear each speaker after ser-edge calibrate on their calm speech under the same condition.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Score a run on test clips that are degraded in memory; several folds are pooled.

    Conditions by group (clean is always there, to compare with):

      noise       white-20 white-10 white-5 babble-20 babble-10 babble-5
                  music-20 music-10 music-5: signal-to-noise ratio in dB;
                  babble is six voices of training speakers, music is made by
                  formula

      room        room-0.3 room-0.6 room-1.0: made by formula (Polack's model) for
                  reverberation times in s, voice and reverberation equally loud

      telephone   300 to 3400 Hz, 8 kHz

      codec       opus, mp3 at their lowest rates, 6 and 8 kbit/s

      level       level-20: 20 dB softer

      microphone  tilt+6 tilt-6: so many dB from 50 Hz to 8 kHz, rising or falling

      length      first-1s first-2s first-3s of each clip

      sliding     mean of the probabilities of windows of 2 s, each heard from a
                  reset, one every 0.5 s; a shorter clip is one window

    Each result is written to RUN/robustness.json as soon as it is there; the same
    command goes on from it.

    Examples:

      sertool robustness runs/loso

      sertool robustness runs/loso --conditions noise,room-0.6 --calibrated
    """
    from sertool.degrade import chosen_conditions
    from sertool.evaluate import Known
    from sertool.robustness import measure_robustness

    chosen = chosen_conditions(conditions)
    known: Known = "calibrated" if calibrated else "nothing"
    with progress_bar() as progress:
        task = progress.add_task("loading", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        found = measure_robustness(run, chosen, part, show, known=known)
    print_status(f"{run / 'robustness.json'}: written")
    if json:
        print_json({"run": str(run)} | found)
    else:
        _print(run, found)


def _print(run: Path, found: dict[str, Any]) -> None:
    knowing = ", each after calibration to the speaker" if found["known"] == "calibrated" else ""
    typer.echo(f"{run}: {found['clips']} {found['part']} clips of {found['speakers']} speakers{knowing}")
    if found["folds_of"] > 1:
        typer.echo(describe_folds(found["folds"], found["folds_of"]))
    table = Table(box=SIMPLE_HEAD)
    for column in ("condition", "UAR", "95 % interval", "minus clean", "95 % interval, paired"):
        table.add_column(column, justify="left" if column == "condition" else "right", no_wrap=True)
    for name, result in found["conditions"].items():
        change = [f"{100 * result['difference']:+z.1f}", range_of_percents(result["difference_interval"], "+z.1f")]
        uar = [f"{result['uar']:.1%}", range_of_percents(result["uar_interval"], ".1f")]
        table.add_row(name, *uar, *(["", ""] if name == "clean" else change))
    OUTPUT.print(table)
    typer.echo(NOTES)
