"""``sertool embed``: let a teacher turn every clip of a corpus into one vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sertool.cli.console import print_json, print_status, progress_bar

if TYPE_CHECKING:
    from sertool.corpora.manifest import Clip


def embed(
    manifest: Annotated[Path, typer.Argument(help="The corpus; make it with: sertool corpus make.")],
    teacher: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder of a transformers speech encoder (Whisper, wav2vec 2.0, HuBERT, WavLM), its name on the "
            "Hugging Face hub (owner/name or owner/name@revision), a folder of sertool teacher tune, or a run folder "
            "of sertool train.",
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option(help="0: what enters the first transformer block; then each block.", show_default="the middle"),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="fc1|fc2|layer:K",
            help="Where a tuned teacher is embedded; layer:K says the same as --layer K.",
            show_default="fc1",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Embeddings folder.")] = Path("embeddings"),
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compute one embedding a clip: the mean over the clip's real frames of what a teacher's layer gives.

    What the folder holds already is not computed again, so the same command goes on after an interruption and
    takes in clips that were added to the manifest. A folder belongs to one teacher at one place.

    Middle layers carry emotion best; the last ones serve the words.

    Examples:

      sertool embed manifest.csv --teacher whisper-base-encoder --layer 3 -o embeddings

      sertool embed manifest.csv --teacher teacher --at fc1 -o embeddings-fc1

      sertool embed manifest.csv --teacher runs/source -o embeddings-source

      torchrun --standalone --nproc_per_node 8 -m sertool embed manifest.csv --teacher facebook/wav2vec2-base
    """
    from sertool.corpora.manifest import load_manifest

    table = load_manifest(manifest)

    import torch

    from sertool import processes
    from sertool.teacher.embed import embed_manifest
    from sertool.teacher.encoder import load_teacher

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_teacher(teacher, layer, device, at)
    computed = 0

    def show(clips: Sequence[Clip]) -> Iterator[Clip]:
        nonlocal computed
        lacking = processes.total(len(clips))
        print_status(f"{loaded.name}: {lacking} of {len(table)} clips to embed")
        with progress_bar() as progress:
            task = progress.add_task("embedding", total=len(clips))
            for clip in clips:
                yield clip
                computed += 1
                speed = progress.tasks[task].speed
                rate = f", {speed:.1f} clips/s" if speed else ""
                progress.update(task, advance=1, description=f"embedding{rate}")

    embeddings = embed_manifest(table, loaded, output, show)
    count, dimension = len(embeddings.rows), len(embeddings.rows[0])
    computed = processes.total(computed)
    if json:
        print_json(
            {
                "folder": str(output),
                "teacher": embeddings.teacher,
                "clips": count,
                "computed": computed,
                "dimension": dimension,
            }
        )
        return
    typer.echo(f"{output}: {count} clips x {dimension} numbers by {loaded.name}, {computed} computed now")
