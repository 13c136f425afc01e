"""``sertool graph``: join the training clips that a teacher finds alike, and say what the graph is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from edge_runtime.errors import UsageError, nearest
from sertool.cli.console import OUTPUT, print_json

PARTS_TO_JOIN = ("train", "validation")


def graph(
    embeddings: Annotated[Path, typer.Argument(help="Folder made by: sertool embed.")],
    manifest: Annotated[Path, typer.Option(help="The corpus.")] = Path("manifest.csv"),
    split: Annotated[Path, typer.Option(help="Whose training speakers are joined.")] = Path("split.json"),
    parts: Annotated[
        list[str],
        typer.Option("--part", help="Part of the split whose clips are joined: train, validation; repeatable."),
    ] = ["train"],  # noqa: B006
    threshold: Annotated[float, typer.Option(help="Smallest cosine of an edge (the paper's epsilon).")] = 0.99,
    neighbours: Annotated[int, typer.Option(help="Most neighbours of a clip (the paper's n).")] = 9,
    centre: Annotated[bool, typer.Option(help="Subtract the mean embedding first.")] = False,
    mutual: Annotated[bool, typer.Option(help="Keep an edge only if both ends choose each other.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Graph folder.")] = Path("graph"),
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the neighbour graph of each fold's training speakers and report what it joins.

    Test speakers are never part of a graph. The report compares raw with centred embeddings: a graph is worth
    having when its edges join one label (homophily) far more often than chance, and not only one speaker.

    Examples:

      sertool graph embeddings --split split.json --threshold 0.99 --neighbours 9 -o graph

      sertool graph embeddings --centre --threshold 0.5 -o graph-centred
    """
    from sertool.corpora.manifest import load_manifest
    from sertool.corpora.splits import load_split
    from sertool.files import write_json
    from sertool.graph import build_graph, diagnose
    from sertool.teacher.embed import load_embeddings

    for part in parts:
        if part not in PARTS_TO_JOIN:
            raise UsageError(f"--part {part!r} cannot be in a graph; {nearest(part, PARTS_TO_JOIN)}")
    table, folds = load_manifest(manifest), load_split(split)
    stored = load_embeddings(embeddings)
    vectors = stored.of(table)
    graphs, reports = [], []
    for number, fold in enumerate(folds.folds, start=1):
        rows = table.indices([speaker for part in parts for speaker in fold.part(part)])
        clips = [table.clips[row] for row in rows]
        keys = [clip.key for clip in clips]
        built = build_graph(keys, vectors[rows], threshold, neighbours, centre, mutual)
        # With the threshold gone, raw and centred embeddings give equally many edges and can be compared.
        without_threshold = {
            name: diagnose(build_graph(keys, vectors[rows], -1.0, neighbours, centred), clips)
            for name, centred in (("nearest_raw", False), ("nearest_centred", True))
        }
        report = {
            "fold": number,
            "teacher": stored.teacher,
            "split_hash": folds.hash,
            "parts": parts,
            "threshold": threshold,
            "neighbours": neighbours,
            "centre": centre,
            "mutual": mutual,
            "graph": diagnose(built, clips),
            **without_threshold,
        }
        graphs.append(built)
        reports.append(report)
    # Written when all are made: folds of two graphs do not mix where the second one fails.
    for built, report in zip(graphs, reports, strict=True):
        folder = output / f"fold-{report['fold']}"
        built.save(folder / "graph.csv")
        write_json(folder / "graph.json", report)
    write_json(output / "report.json", reports)
    if json:
        print_json(reports)
    else:
        _print(reports)
        typer.echo(f"{output}: {len(reports)} fold(s); use it with: sertool train --set neighbours.graph={output}")


def _print(reports: list[dict[str, Any]]) -> None:
    table = Table(title="neighbour graph of each fold's training speakers: share of edges that join ...")
    for column in ("fold", "clips", "edges", "isolated", "one label", "one speaker", "label, raw", "centred"):
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
    first = reports[0]["graph"]
    degrees = np.sum([report["graph"]["degrees"] for report in reports], axis=0)
    for line in (
        f"by chance (fold 1): one label {first['homophily_by_chance']:.0%}, "
        f"one speaker {first['same_speaker_by_chance']:.0%}",
        "label, raw / centred: of each clip's nearest neighbours, whatever their cosine",
        "clips by number of neighbours: " + "  ".join(f"{degree}: {count}" for degree, count in enumerate(degrees)),
    ):
        OUTPUT.print(line, highlight=False)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
