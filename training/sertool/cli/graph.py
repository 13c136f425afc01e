"""``sertool graph``: join the training clips that a teacher finds alike, and say what the graph is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from sertool.cli.console import OUTPUT, print_json, print_status

MOSTLY_ISOLATED = 0.5
"""Above this share of clips without neighbours, the neighbour loss has little to say."""


def graph(
    embeddings: Annotated[Path, typer.Argument(help="Folder made by: sertool embed.")],
    manifest: Annotated[Path, typer.Option(help="The corpus.")] = Path("manifest.csv"),
    split: Annotated[Path, typer.Option(help="Whose training speakers are joined.")] = Path("split.json"),
    parts: Annotated[
        list[str],
        typer.Option("--part", help="Part of the split whose clips are joined: train, validation; repeatable."),
    ] = ["train"],  # noqa: B006
    threshold: Annotated[float, typer.Option(help="Smallest cosine of an edge (the paper's epsilon).")] = 0.99,
    neighbours: Annotated[int, typer.Option(min=1, help="Most neighbours of a clip (the paper's n).")] = 9,
    centre: Annotated[bool, typer.Option(help="Subtract the mean embedding first.")] = False,
    mutual: Annotated[bool, typer.Option(help="Keep an edge only if both ends choose each other.")] = False,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Take a teacher that was trained on speakers of this split.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare all clips with all, also beyond 50,000 of them.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Graph folder.")] = Path("graph"),
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the neighbour graph of each fold's training speakers and report what it joins.

    Test speakers are never part of a graph, and a teacher that was trained on speakers of the split is refused. The
    report compares raw with centred embeddings: a graph is worth having when its edges join one label (homophily) far
    more often than chance, and not only one speaker.

    Examples:

      sertool graph embeddings --split split.json --threshold 0.99 --neighbours 9 -o graph

      sertool graph embeddings --centre --threshold 0.5 -o graph-centred
    """
    from sertool.corpora.manifest import load_manifest
    from sertool.corpora.splits import load_split
    from sertool.graph import build_fold_graphs, save_fold_graphs
    from sertool.teacher.embed import load_embeddings

    graphs = build_fold_graphs(
        load_manifest(manifest),
        load_split(split),
        load_embeddings(embeddings),
        parts=parts,
        threshold=threshold,
        max_neighbours=neighbours,
        centre=centre,
        mutual=mutual,
        allow_seen=allow_seen,
        exact=exact,
    )
    save_fold_graphs(output, graphs)
    reports = [made.report for made in graphs]
    if json:
        print_json(reports)
    else:
        _print(reports)
        typer.echo(f"{output}: {len(reports)} fold(s); use it with: sertool train --set neighbours.graph={output}")
    isolated = max(report["graph"]["isolated"] for report in reports)
    if isolated > MOSTLY_ISOLATED:
        centring = "" if centre else ", perhaps with --centre"
        print_status(f"{output}: {isolated:.0%} of the clips have no neighbour; try a lower --threshold{centring}")


def _print(reports: list[dict[str, Any]]) -> None:
    table = Table(title="neighbour graph of each fold's training speakers")
    for column in (
        "fold",
        "clips",
        "edges",
        "clips\nwithout\nedge",
        "edges\nin one\nlabel",
        "edges\nin one\nspeaker",
        "nearest\nin one\nlabel",
        "centred\nnearest in\none label",
    ):
        table.add_column(column, justify="right")
    for report in reports:
        measured = report["graph"]
        table.add_row(
            str(report["fold"]),
            str(measured["clips"]),
            str(measured["edges"]),
            f"{measured['isolated']:.0%}",
            _percent(measured["homophily"]),
            _percent(measured["same_speaker"]),
            _percent(report["nearest_raw"]["homophily"]),
            _percent(report["nearest_centred"]["homophily"]),
        )
    OUTPUT.print(table)
    first, search = reports[0]["graph"], reports[0]["search"]
    degrees = np.sum([report["graph"]["degrees"] for report in reports], axis=0)
    for line in (
        f"two clips drawn at random: in one label {first['homophily_by_chance']:.0%}, "
        f"in one speaker {first['same_speaker_by_chance']:.0%} (fold 1)",
        f"nearest: the {reports[0]['neighbours']} nearest neighbours of each clip, whatever their cosine",
        f"search: {search['index']}, {search['recall']:.1%} of the true neighbours of a sample found (fold 1)",
        "clips by number of neighbours: " + "  ".join(f"{degree}:{count}" for degree, count in enumerate(degrees)),
    ):
        OUTPUT.print(line)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
