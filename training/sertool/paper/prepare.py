"""What all cells of a sweep share: manifest, split, log-Mel spectrograms, embeddings and graphs, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edge_runtime.errors import SerError
from edge_runtime.frontend import FrontEnd
from sertool.corpora.adapters import corpus_clips, corpus_named
from sertool.corpora.manifest import Clip, Manifest, load_manifest
from sertool.corpora.splits import Split, load_split, make_split
from sertool.features import Progress, log_mel_windows
from sertool.graph import build_fold_graphs, save_fold_graphs
from sertool.paper.sweep import Cell, Part, Sweep, Tuned, expand
from sertool.teacher.embed import Embeddings, embed_manifest, load_embeddings

EmbedProgress = Callable[[str, Sequence[Clip]], Iterable[Clip]]
"""Is given a teacher's name and the clips to embed, and yields them."""
Say = Callable[[str], None]
"""Is told in one line what goes on."""


def prepare_corpus(sweep: Sweep, folder: Path) -> tuple[Manifest, Split]:
    """Return manifest and split of a sweep, made anew where they are not given.

    Both follow from the sweep and the corpus alone, so that making them again changes nothing.

    Raises:
        UsageError: what is given is missing or unfit, or the corpus has no adapter or is not there.
    """
    path, split = sweep.manifest(folder), sweep.split(folder)
    if "manifest" not in sweep.data.model_fields_set:
        _make_manifest(sweep.data.corpus, sweep.corpus.root, path)
    manifest = load_manifest(path)
    if "split" not in sweep.data.model_fields_set:
        make_split(manifest, sweep.corpus.protocol, sweep.corpus.split_seed).save(split)
    return manifest, load_split(split)


def _make_manifest(name: str, root: str, path: Path) -> None:
    corpus = corpus_named(name)
    clips = corpus_clips(corpus, expand(root or f"$SERTOOL_DATA/corpora/{name}"))
    Manifest(tuple(clip for clip in clips if clip.label not in corpus.left_out), path).save(path)


def prepare_features(sweep: Sweep, manifest: Manifest, progress: Progress | None = None) -> None:
    """Compute the log-Mel spectrograms that all cells read; see :func:`sertool.features.log_mel_windows`."""
    log_mel_windows(manifest, FrontEnd(), sweep.data.window_samples, progress)


def prepare_graphs(
    sweep: Sweep,
    folder: Path,
    manifest: Manifest,
    split: Split,
    cells: Iterable[Cell],
    on_clips: EmbedProgress,
    say: Say,
) -> dict[tuple[Part, str], str]:
    """Build the graphs that some cells are trained with, and the embeddings they need.

    Returns:
        why a graph could not be built, by part and name; the cells on other graphs can be trained.

    Raises:
        UsageError: a teacher that is not there, or does not have this layer.
        SerError: a teacher that is damaged, or clips that it cannot embed.
    """
    wanted = sorted({(cell.setting.part, cell.setting.graph) for cell in cells if cell.setting.graph})
    embeddings: dict[str, Embeddings] = {}
    failures: dict[tuple[Part, str], str] = {}
    for part, name in wanted:
        graph = sweep.graphs[name]
        if graph.teacher not in embeddings:
            embeddings[graph.teacher] = _embed(sweep, graph.teacher, folder, manifest, on_clips, say)
        try:
            graphs = build_fold_graphs(
                manifest,
                split,
                embeddings[graph.teacher],
                parts=sweep.trained_parts(part),
                threshold=graph.threshold,
                max_neighbours=graph.neighbours,
                centre=graph.centre,
                mutual=graph.mutual,
                allow_seen=graph.allow_seen,
            )
        except SerError as error:
            failures[part, name] = f"graph {name}: {error}"
        else:
            save_fold_graphs(sweep.graph_folder(folder, name, part), graphs)
    return failures


def _embed(sweep: Sweep, name: str, folder: Path, manifest: Manifest, on_clips: EmbedProgress, say: Say) -> Embeddings:
    settings = sweep.teachers[name]
    if settings.embeddings:
        return load_embeddings(expand(settings.embeddings))
    from sertool.teacher.encoder import load_teacher

    if settings.tuned:
        source = folder / "tuned" / settings.tuned
        _tune(sweep.tuned[settings.tuned], source, f"tuned.{settings.tuned}", say)
    else:
        source = expand(settings.source)
    teacher = load_teacher(str(source), at=settings.at or None)
    return embed_manifest(manifest, teacher, folder / "embeddings" / name, lambda clips: on_clips(teacher.name, clips))


def _tune(tuned: Tuned, folder: Path, where: str, say: Say) -> None:
    """Tune a teacher, or go on with it; manifest and split lie beside it where they are made here."""
    from sertool.teacher.tune import tune
    from sertool.teacher.tuned import parse_settings

    manifest, split = (folder.with_name(f"{folder.name}{suffix}").absolute() for suffix in (".csv", ".json"))
    if tuned.manifest:
        manifest = expand(tuned.manifest).absolute()
    else:
        _make_manifest(tuned.corpus, tuned.root, manifest)
    if tuned.split:
        split = expand(tuned.split).absolute()
    else:
        make_split(load_manifest(manifest), tuned.protocol).save(split)
    places = {"encoder": str(expand(tuned.encoder)), "manifest": str(manifest), "split": str(split)}
    tune(
        parse_settings({**tuned.options, **places, "corpus": tuned.corpus}, where),
        folder,
        on_start=lambda line: say(f"{where}: {line}"),
        on_epoch=lambda epoch: say(
            f"{where}: epoch {epoch.epoch} of {epoch.epochs}, loss {epoch.loss:.3f}, {epoch.seconds:.0f} s"
        ),
    )
