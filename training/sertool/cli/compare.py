"""``sertool compare``: whether runs differ by more than the choice of speakers and seeds explains."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from edge_runtime.errors import UsageError
from sertool.cli.console import OUTPUT, print_json
from sertool.cli.evaluate import describe_folds

METRICS = {"uar": "UAR", "accuracy": "accuracy"}
NOTES = """\
Pooled: all folds as one, averaged over seeds. After ±: standard deviation.
Differences are in percentage points.
Intervals draw other speakers, the same for both sides of a difference; with
fewer than ten speakers they are rough. Seeds: how far the difference of other
seeds may lie, in 95 of 100 cases (Welch); believe one that is beyond both.
z-test: the paper's, one-tailed, as if the UAR were a share of independent
clips, other clips for each set. Clips of a speaker are alike, and both sets
have the same ones: trust the interval rather than this p.
McNemar: exact, two-sided, on the same clips (right in one set only), yet as if
they were independent. With seeds, p is the median over all pairs of them.
No p is corrected for the number of comparisons."""


def compare(
    sets: Annotated[
        list[str],
        typer.Argument(
            metavar="BASELINE SET...",
            help="Each a run, the folder above the folds of one, or several seeds of these: joined by commas or "
            "matched by a pattern in quotes. @calibrated behind it: as sertool evaluate --calibrated found it.",
        ),
    ],
    part: Annotated[str, typer.Option(help="Part of the split: test, validation or train.")] = "test",
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare evaluated runs, or sets of runs, with the first one named.

    All must have the same split and clips. Folds are pooled, seeds of a set are
    averaged. Intervals resample speakers, jointly for both sides of a
    difference, so that it is paired; beside them stands what seeds explain.

    Examples:

      sertool compare runs/base runs/graph

      sertool compare runs/base-1,runs/base-2 runs/graph-1,runs/graph-2

      sertool compare 'runs/base-*' 'runs/n3-*' 'runs/n6-*' --json

      sertool compare runs/device runs/device@calibrated

    Without the quotes the shell makes every run that a pattern matches a set of
    its own.
    """
    from sertool.compare import compare as compare_sets
    from sertool.compare import load_set

    if len(sets) < 2:
        raise UsageError("one set alone cannot be compared; name the baseline first, then one set or more")
    comparison = compare_sets([load_set(name, part) for name in sets])
    if json:
        print_json({"part": part} | comparison)
    else:
        _print(comparison, part)


def _print(comparison: dict[str, Any], part: str) -> None:
    typer.echo(
        f"{comparison['clips']} {part} clips of {comparison['speakers']} speakers, split {comparison['split_hash']}"
    )
    for number, runs in enumerate(comparison["sets"], start=1):
        folds = describe_folds(runs["folds"], runs["folds_of"])
        typer.echo(f"{number}: {runs['name']} (seeds: {len(runs['runs'])}, {folds})")
    OUTPUT.print(_table_of_sets(comparison["sets"]))
    OUTPUT.print(_table_of_differences(comparison["differences"]))
    typer.echo(NOTES)


def _table_of_sets(sets: list[dict[str, Any]]) -> Table:
    table = _empty_table("set", "", "pooled", "95 % interval", "over seeds", "over folds")
    for number, runs in enumerate(sets, start=1):
        for metric, name in METRICS.items():
            score = runs[metric]
            table.add_row(
                str(number),
                name,
                f"{score['mean']:.1%}",
                range_of_percents(score["interval"], ".1f"),
                _spread(score["by_seed"], score["seed_deviation"]),
                _spread(score["by_fold"], score["fold_deviation"]),
            )
    return table


def _table_of_differences(differences: list[dict[str, Any]]) -> Table:
    from sertool.compare import half_width

    table = _empty_table("set", "", "minus 1", "95 % interval", "seeds", "test", "p")
    for number, row in enumerate(differences, start=2):
        z_test, mcnemar = row["z_test"], row["mcnemar"]
        tests = {"uar": (f"z-test, {z_test['z']:z.2f}", z_test["p"]), "accuracy": (_mcnemar(mcnemar), mcnemar["p"])}
        for metric, name in METRICS.items():
            test, p = tests[metric]
            change, interval = 100 * row[metric]["difference"], range_of_percents(row[metric]["interval"], "+z.1f")
            seeds = half_width(row[metric]["seed_interval"])
            chance = "<0.001" if p < 0.001 else f"{p:.3f}"
            table.add_row(str(number), name, f"{change:+z.1f}", interval, seeds, test, chance)
    return table


def _empty_table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def range_of_percents(interval: list[float] | None, style: str) -> str:
    """Return an interval of shares as text, both ends in percent, formatted by ``style``."""
    return "one speaker" if interval is None else " to ".join(format(100 * end, style) for end in interval)


def _spread(values: list[float], deviation: float | None) -> str:
    return "-" if deviation is None else f"{sum(values) / len(values):.1%} ± {100 * deviation:.1f}"


def _mcnemar(result: dict[str, Any]) -> str:
    pair, *others = result["pairs"]
    counts = f"{len(others) + 1} pairs" if others else f"{pair['only_baseline']} : {pair['only_set']}"
    return f"McNemar, {counts}"
