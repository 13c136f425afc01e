"""The adversary: its gradient against one by hand, that features hide what they are to hide, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from edge_runtime.errors import UsageError
from sertool.augment import Mixture
from sertool.corpora.manifest import Clip
from sertool.fit import EpochReport, fit
from sertool.invariance import Adversary, adversary_strength
from sertool.recipe import Invariance, parse_recipe
from sertool.run import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS = [
    Clip(f"{number}.wav", Path(f"{number}.wav"), speaker, "joy")
    for number, speaker in enumerate(["emodb/ada", "emodb/bea", "ravdess/ada", "emodb/ada", "ravdess/cyd"])
]


@pytest.mark.parametrize(("to", "domains"), [("speaker", [0, 1, 2, 0, 3]), ("corpus", [0, 0, 1, 0, 1])])
@pytest.mark.parametrize("mixture", [None, Mixture(0.7, torch.tensor([2, 0, 1]))])
def test_the_adversary_learns_and_the_network_unlearns(to: Any, domains: list[int], mixture: Mixture | None) -> None:
    """By hand: the adversary's gradient is that of its weighted cross entropy; the network's is the opposite."""
    torch.manual_seed(0)
    adversary = Adversary(Invariance(to=to, weight=0.3), CLIPS, 6)
    rows, pooled = torch.tensor([4, 0, 2]), torch.randn(3, 6, requires_grad=True)
    loss = adversary.loss(rows, mixture, pooled, done=0.25)
    loss.backward()
    weights = [weight.grad for weight in adversary.parameters()]

    truth = functional.one_hot(torch.tensor(domains)[rows]).float()
    truth = 0.7 * truth + 0.3 * truth[[2, 0, 1]] if mixture else truth
    features = pooled.detach().clone().requires_grad_()
    plain = 0.3 * functional.cross_entropy(adversary.classifier(features), truth)
    adversary.zero_grad()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert pooled.grad is not None
    assert features.grad is not None
    torch.testing.assert_close(pooled.grad, -adversary_strength(0.25) * features.grad)
    for ours, weight in zip(weights, adversary.parameters(), strict=True):
        torch.testing.assert_close(ours, weight.grad)


def test_the_strength_is_that_of_the_paper() -> None:
    done = np.linspace(0, 1, 11)
    assert [adversary_strength(share) for share in done] == pytest.approx(2 / (1 + np.exp(-10 * done)) - 1)


def share_of_variance(features: torch.Tensor, groups: torch.Tensor) -> float:
    """Return how much of the variance of features lies between two groups."""
    centred = features - features.mean(0)
    means = torch.stack([centred[groups == group].mean(0) for group in (0, 1)])
    return float(means[groups].square().sum() / centred.square().sum())


def test_features_hide_the_speaker_and_keep_the_label() -> None:
    torch.manual_seed(0)
    speaker, label = torch.randint(0, 2, (2, 400))
    inputs = torch.stack([2.0 * speaker - 1, 2.0 * label - 1], 1) + 0.3 * torch.randn(400, 2)
    clips = [Clip(f"{row}.wav", Path(f"{row}.wav"), f"voice {who}", "joy") for row, who in enumerate(speaker.tolist())]

    def learnt(weight: float) -> tuple[float, float]:
        torch.manual_seed(1)
        trunk, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        adversary = Adversary(Invariance(weight=weight), clips, 2)
        optimizer = torch.optim.SGD(torch.nn.ModuleList([trunk, head, adversary]).parameters(), lr=0.005)
        for step in range(400):
            features = trunk(inputs)
            loss = functional.cross_entropy(head(features), label)
            loss = loss + adversary.loss(torch.arange(400), None, features, step / 400)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        features = trunk(inputs).detach()
        return share_of_variance(features, speaker), share_of_variance(features, label)

    told, hidden = learnt(0.0), learnt(1.0)
    assert hidden[0] < 0.5 * told[0]
    assert hidden[1] > told[1]


# --- trainings -----------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


SHORT = {"training__epochs": 2, "training__batch_size": 8}


def test_a_weight_too_small_to_count_changes_nothing(tones: Any, tmp_path: Path) -> None:
    """So the rest of a training hangs on the adversary's gradient alone: not on its draws, for one."""
    fit(tones.recipe(**SHORT), tmp_path / "base")
    fit(tones.recipe(invariance__weight=1e-36, **SHORT), tmp_path / "hardly")
    assert_same_weights(tmp_path / "hardly", tmp_path / "base")  # and so the adversary is in neither


def test_a_stopped_training_resumes_to_the_same_weights(tones: Any, tmp_path: Path) -> None:
    recipe = tones.recipe(
        invariance__weight=0.5, augmentation__mixup=0.5, data__labelled_share=0.5, training__average=0.9, **SHORT
    )
    reports: list[EpochReport] = []
    fit(recipe, tmp_path / "whole", on_epoch=reports.append)
    # Four speakers, each as likely at first, at half the weight.
    assert reports[0].invariance_loss == pytest.approx(0.5 * np.log(4), rel=0.2)
    trained = json.loads((tmp_path / "whole" / "trained.json").read_text())
    assert len(trained) == 2 * sum(bool(clip["label"]) for clip in trained.values()) == 48  # it needs no labels

    def stop(report: EpochReport) -> None:
        raise KeyboardInterrupt

    adversaries = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, tmp_path / "stopped", on_epoch=stop)
        adversaries.append(load_file(tmp_path / "stopped" / "resume.safetensors")["adversary.classifier.0.weight"])
    assert not torch.equal(*adversaries)  # it learns too
    fit(recipe, tmp_path / "stopped", on_epoch=pytest.fail)
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert (tmp_path / "stopped" / "history.csv").read_text().splitlines()[0].split(",")[5] == "invariance_loss"


def test_one_corpus_has_nothing_to_hide(tones: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"invariance\.to = 'corpus': all training clips are of one corpus, .* sertool corpus join; or set",
    ):
        fit(tones.recipe(invariance__to="corpus", invariance__weight=1.0), tmp_path / "run")


def test_rounding_is_trained_without_an_adversary(sertool: Any, tones: Any, tmp_path: Path) -> None:
    recipe = tones.recipe(invariance__weight=0.5, **(SHORT | {"training__epochs": 1}))
    fit(recipe, tmp_path / "run")
    training = recipe.training.model_dump() | {"start": "run", "quantization_aware": True}
    with pytest.raises(UsageError, match=r"invariance\.weight = 0\.5: quantisation-aware training keeps what"):
        parse_recipe(recipe.model_dump() | {"training": training})
    done = sertool("train", "--from", tmp_path / "run", "--qat", "--set", "training.epochs=1")
    assert done.code == 0, done.err
    assert load_run(tmp_path / "run-qat").recipe.invariance.weight == 0
