"""The README's first table: ResNet-9 on EMOVO and EmoDB, leave one speaker out, with and without the teacher's graph.

The paper's settings, but shorter trainings, so that two cores finish in an afternoon. Stopped and started again, it
goes on where it was; two runs may work side by side, one with ``--only base``, one with ``--only graph``.

    SERTOOL_DATA=... python tools/first_results.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo import real_data, run

# Epochs, and epochs after which the learning rate decays: at the end it is near the paper's, which takes 50 and 5.
SCHEDULES = {"emovo": (15, 2), "emodb": (10, 1)}
# The paper's second setting of Table 3, with remembered embeddings (mode bank) instead of extra forward passes.
NEIGHBOURS = "--set neighbours.count=6 --set neighbours.alpha=0.1 --set neighbours.mode=bank"
RECIPE = """\
[data]
manifest = "{folder}/manifest.csv"
split = "{folder}/split.json"
corpus = "{corpus}"

[training]
epochs = {epochs}
decay_epochs = {decay_epochs}
threads = 1
"""


def prepare(corpus: str, folder: Path) -> Path:
    """Make manifest, split, embeddings, graphs and recipe of a corpus; return the recipe."""
    data = real_data(corpus)
    manifest, split, embeddings = (folder / name for name in ("manifest.csv", "split.json", "embeddings"))
    run(f"sertool corpus make {corpus}", root=data / "corpora" / corpus, output=manifest)
    run(f"sertool split make {manifest} --protocol loso", output=split)
    run(f"sertool embed {manifest} --layer 3", teacher=data / "encoders" / "whisper-base-encoder", output=embeddings)
    run(
        f"sertool graph {embeddings} --threshold 0.99 --neighbours 9",
        manifest=manifest,
        split=split,
        output=folder / "graph",
    )
    epochs, decay_epochs = SCHEDULES[corpus]
    recipe = folder / "recipe.toml"
    text = RECIPE.format(folder=folder, corpus=corpus, epochs=epochs, decay_epochs=decay_epochs)
    recipe.write_text(text, encoding="utf-8")
    return recipe


def main() -> None:
    """Train, evaluate and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/first-results"), help="where everything goes")
    parser.add_argument("--only", choices=["base", "graph"], help="train only one of the two")
    options = parser.parse_args()

    for corpus in SCHEDULES:
        folder = options.folder / corpus
        recipe = prepare(corpus, folder)
        settings = {"base": "", "graph": f"--set neighbours.graph={folder / 'graph'} {NEIGHBOURS}"}
        for name in [options.only] if options.only else list(settings):
            run(f"sertool train {recipe} --fold all {settings[name]}", output=folder / name)
            run(f"sertool evaluate {folder / name}")
        if not options.only:
            run(f"sertool compare {folder / 'base'} {folder / 'graph'}")


if __name__ == "__main__":
    main()
