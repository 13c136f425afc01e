"""How much a teacher's embeddings know of the labels: logistic regression on speakers it was not fitted on.

A ceiling to hold students against: same split, same test clips, the embeddings themselves instead of a light network.

    python tools/probe_teacher.py embeddings --manifest manifest.csv --split split.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sertool.corpora.manifest import load_manifest
from sertool.corpora.splits import load_split
from sertool.metrics import confusion_matrix, speaker_interval, unweighted_average_recall
from sertool.teacher.embed import load_embeddings


def main() -> None:
    """Fit and test each fold, pool all test clips, print UAR and interval."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--manifest", type=Path, default=Path("manifest.csv"))
    parser.add_argument("--split", type=Path, default=Path("split.json"))
    parser.add_argument("--strength", type=float, default=0.01, help="scikit-learn's C: smaller regularises more")
    options = parser.parse_args()

    manifest = load_manifest(options.manifest)
    vectors = load_embeddings(options.embeddings).of(manifest)
    targets = np.array([manifest.labels.index(clip.label) for clip in manifest.clips])
    by_speaker = []
    for fold in load_split(options.split).folds:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=options.strength, class_weight="balanced", max_iter=1000)
        )
        train = manifest.indices(list(fold.train))
        model.fit(vectors[train], targets[train])
        for speaker in fold.test:
            rows = manifest.indices([speaker])
            by_speaker.append(confusion_matrix(targets[rows], model.predict(vectors[rows]), len(manifest.labels)))
    low, high = speaker_interval(by_speaker)
    uar = unweighted_average_recall(np.sum(by_speaker, axis=0))
    print(f"UAR {uar:.1%}, 95 % interval {low:.1%} to {high:.1%} over {len(by_speaker)} speakers")


if __name__ == "__main__":
    main()
