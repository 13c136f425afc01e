"""Each loss against worked numbers, a plain loop over its formula or another library, and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance as scipy_distance
from scipy.special import softmax
from scipy.stats import entropy
from torch.nn import functional

from sertool.losses import (
    DISTANCES,
    embedding_loss,
    labelled_cross_entropy,
    neighbour_loss,
    opinion_loss,
    relation_loss,
)

# The worked example in the documentation of TensorFlow Neural Structured Learning's distances.
SOURCES = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 2.0], [5.0, 5.0]])
TARGETS = torch.tensor([[1.0, 1.0], [0.0, 2.0], [4.0, 4.0], [1.0, 4.0]])
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 0.5])

SCIPY = {"cosine": scipy_distance.cosine, "l1": scipy_distance.cityblock, "l2": scipy_distance.sqeuclidean}


@pytest.mark.parametrize(("distance", "expected"), [("l1", 5.5 / 3), ("l2", 18.5 / 3)])
def test_equals_neural_structured_learning(distance: str, expected: float) -> None:
    loss = neighbour_loss(SOURCES, TARGETS[:, None], WEIGHTS[:, None], distance)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_cosine_equals_neural_structured_learning() -> None:
    sources = torch.tensor([[1.0, 1.0], [1.0, 1.0], [3.0, 4.0], [-1.0, -1.0]])
    targets = torch.tensor([[1.0, 1.0], [5.0, 5.0], [4.0, 3.0], [1.0, 1.0]])
    assert float(neighbour_loss(sources, targets[:, None], torch.ones(4, 1))) == pytest.approx(0.51, abs=1e-6)


def test_distances_are_averaged_over_the_neighbours_of_a_sample_first_and_then_over_the_samples() -> None:
    samples = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    neighbours = torch.tensor(
        [
            [[1.0, 1.0], [0.0, 0.0], [4.0, 0.0]],  # L1: 1, 1, 3
            [[0.0, 0.0], [9.0, 9.0], [9.0, 9.0]],  # L1: 2, and two that are missing
            [[9.0, 9.0], [9.0, 9.0], [9.0, 9.0]],  # none
        ]
    )
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(neighbour_loss(samples, neighbours, weights, "l1")) == pytest.approx(((1 + 1 + 3) / 3 + 2) / 2)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 6),
    most=st.integers(1, 4),
    name=st.sampled_from(sorted(DISTANCES)),
)
def test_equals_a_plain_loop_with_distances_of_scipy(seed: int, batch: int, most: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    samples, neighbours = rng.normal(size=(batch, 5)), rng.normal(size=(batch, most, 5))
    weights = (rng.random((batch, most)) < 0.6).astype(float)
    means = [
        np.mean([SCIPY[name](samples[i], neighbours[i, k]) for k in range(most) if weights[i, k]])
        for i in range(batch)
        if weights[i].any()
    ]
    loss = neighbour_loss(*map(torch.from_numpy, (samples, neighbours, weights)), name)
    assert float(loss) == pytest.approx(np.mean(means) if means else 0.0, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_gradients_equal_finite_differences_and_reach_samples_and_neighbours(name: str) -> None:
    torch.manual_seed(0)
    samples = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    neighbours = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, n: neighbour_loss(s, n, weights, name), (samples, neighbours))
    neighbour_loss(samples, neighbours, weights, name).backward()
    assert samples.grad is not None and neighbours.grad is not None
    assert (samples.grad.abs().sum(1) > 0).tolist() == [True, True, False]
    assert (neighbours.grad.abs().sum(2) > 0).tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize("name", sorted(DISTANCES))
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_silent_embeddings_give_no_nan(name: str, weight: float) -> None:
    # A rectified embedding may be all zeros, where the cosine has no direction.
    samples = torch.zeros(2, 3, requires_grad=True)
    neighbours = torch.zeros(2, 1, 3, requires_grad=True)
    loss = neighbour_loss(samples, neighbours, torch.full((2, 1), weight), name)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(samples.grad).all() and torch.isfinite(neighbours.grad).all()


def test_a_batch_without_neighbours_costs_nothing() -> None:
    samples = torch.randn(4, 3, requires_grad=True)
    loss = neighbour_loss(samples, torch.randn(4, 2, 3), torch.zeros(4, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(samples.grad, torch.zeros(4, 3))


def test_isolated_samples_do_not_thin_out_the_loss() -> None:
    samples, neighbours = torch.randn(4, 3), torch.randn(4, 2, 3)
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    connected = weights.any(1)
    alone = neighbour_loss(samples[connected], neighbours[connected], weights[connected])
    assert float(neighbour_loss(samples, neighbours, weights)) == pytest.approx(float(alone))


# --- distillation --------------------------------------------------------------------------------------------------


def test_embedding_loss_is_the_mean_of_one_minus_cosine() -> None:
    mapped = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    embeddings = torch.tensor([[4.0, 3.0], [0.0, -1.0], [0.0, 7.0]])
    assert float(embedding_loss(mapped, embeddings)) == pytest.approx(((1 - 24 / 25) + 2 + 1) / 3)


def relations_by_hand(features: np.ndarray, embeddings: np.ndarray, temperature: float) -> float:
    """Return the mean divergence, clip by clip, of the softmax over cosines to all others."""

    def shares(vectors: np.ndarray, clip: int) -> np.ndarray:
        others = [other for other in range(len(vectors)) if other != clip]
        cosines = np.array([1 - scipy_distance.cosine(vectors[clip], vectors[other]) for other in others])
        return softmax(cosines / temperature)

    clips = range(len(features))
    return float(np.mean([entropy(shares(embeddings, clip), shares(features, clip)) for clip in clips]))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(2, 7), temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_relation_loss_equals_a_plain_loop(seed: int, batch: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    features, embeddings = rng.normal(size=(batch, 5)), rng.normal(size=(batch, 8))
    loss = relation_loss(torch.from_numpy(features), torch.from_numpy(embeddings), temperature)
    assert float(loss) == pytest.approx(relations_by_hand(features, embeddings, temperature), rel=1e-9, abs=1e-12)


def test_relations_are_blind_to_rotation_and_length() -> None:
    rng = np.random.default_rng(0)
    embeddings = torch.from_numpy(rng.normal(size=(6, 4)))
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(4, 4)))[0])
    lengths = torch.arange(1.0, 7.0)[:, None]
    assert float(relation_loss(lengths * embeddings @ rotation, embeddings)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_clip_with_nothing_to_choose_between_has_no_relations(batch: int) -> None:
    features = torch.randn(batch, 3, requires_grad=True)
    loss = relation_loss(features, torch.randn(batch, 4))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(features.grad, torch.zeros(batch, 3))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_opinion_loss_equals_the_divergence_of_scipy(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits, opinions = 3 * rng.normal(size=(5, 4)), softmax(rng.normal(size=(5, 4)), axis=1)
    expected = temperature**2 * np.mean(entropy(opinions, softmax(logits / temperature, axis=1), axis=1))
    loss = opinion_loss(torch.from_numpy(logits), torch.from_numpy(opinions), temperature)
    assert float(loss) == pytest.approx(float(expected))


@pytest.mark.parametrize("loss", [relation_loss, embedding_loss, lambda a, b: opinion_loss(a, b.softmax(1), 2.0)])
def test_gradients_of_distillation_equal_finite_differences(loss: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: loss(values, teacher), student)


def test_features_that_are_all_zero_are_taught_without_a_nan() -> None:
    features = torch.zeros(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4)
    (relation_loss(features, teacher) + embedding_loss(features, teacher)).backward()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_the_labelled_part(smoothing: float) -> None:
    """By torch on the labelled clips alone; of a mixture, by hand: its labelled share of that clip's error."""
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([2, 0, 1])
    truth = torch.zeros(5, 3)
    truth[:3] = functional.one_hot(labels, 3)
    alone = functional.cross_entropy(logits[:3], labels, reduction="none", label_smoothing=smoothing)
    assert float(labelled_cross_entropy(logits, truth, smoothing)) == pytest.approx(float(alone.mean()), rel=1e-6)
    truth[2] *= 0.3
    expected = (alone[0] + alone[1] + 0.3 * alone[2]) / 2.3
    assert float(labelled_cross_entropy(logits, truth, smoothing)) == pytest.approx(float(expected), rel=1e-6)


def test_cross_entropy_of_a_batch_without_labels_is_nothing_and_pulls_at_nothing() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = labelled_cross_entropy(logits, torch.zeros(4, 3), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
