"""What a step reads: windows as in the paper, and excerpts as a device hears them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.errors import UsageError
from edge_runtime.frontend import FrontEnd, Normalization, RunningNormalizer, log_mel
from sertool.batches import Choices, Excerpts, Windows, hear_in_turn, padded
from sertool.corpora.manifest import load_manifest
from sertool.features import ClipFrames, cache_folder, log_mel_clips, measure_normalization
from sertool.networks import TimeReach, build_network
from sertool.recipe import Augmentation

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONSTANT = Normalization((-50.0,) * 64, (10.0,) * 64)
RUNNING = Normalization((-50.0,) * 64, (10.0,) * 64, prior_frames=30, memory_frames=60)
LENGTHS = [20, 90, 45, 33, 70, 64]
SPEAKERS = ["a", "b", "a", "b", "a", "b"]


@pytest.fixture(scope="module")
def clips() -> ClipFrames:
    frames = np.random.default_rng(0).normal(-45, 12, (sum(LENGTHS), 64)).astype(np.float32)
    return ClipFrames(frames, np.cumsum(LENGTHS))


def excerpts(clips: ClipFrames, normalization: Normalization, excerpt: int = 32, **options: Any) -> Excerpts:
    choices = options.pop("choices", Choices([normalization] * len(clips)))
    augmentation = Augmentation(excerpt_frames=excerpt, **options)
    return Excerpts(clips, SPEAKERS, normalization, choices, augmentation, stride=16, device=CPU)


def test_an_excerpt_is_a_stretch_of_the_normalised_clip_with_zeros_after(clips: ClipFrames) -> None:
    source = excerpts(clips, CONSTANT)
    random = np.random.default_rng(1)
    offsets = set()
    for _ in range(30):
        batch = source.batch(torch.tensor([1, 0]), random)
        assert batch.inputs.shape == (2, 1, 32, 64) and batch.features is not None
        assert batch.features.tolist() == [2, 1]
        whole = CONSTANT.apply(clips[1])
        found = [at for at in range(59) if np.array_equal(whole[at : at + 32], batch.inputs[0, 0].numpy())]
        offsets |= set(found)
        assert len(found) == 1
        short = batch.inputs[1, 0].numpy()
        assert np.array_equal(short[:20], CONSTANT.apply(clips[0])) and not short[20:].any()
    assert len(offsets) > 15


def test_a_share_of_the_clips_is_normalised_by_constants_of_their_own_anew_in_each_epoch(clips: ClipFrames) -> None:
    own = [Normalization((-30.0 - row,) * 64, (5.0,) * 64) for row in range(len(clips))]
    source = excerpts(clips, CONSTANT, 90, choices=Choices([CONSTANT] * len(clips), own, share=0.3))
    random, chosen = np.random.default_rng(4), []
    for _ in range(100):
        source.begin(random)
        inputs = source.batch(torch.arange(len(clips)), random).inputs[:, 0].numpy()
        for row, clip in enumerate(clips):
            usual, personal = (constants.apply(clip) for constants in (CONSTANT, own[row]))
            is_own = bool(np.array_equal(inputs[row, : len(clip)], personal))
            assert is_own or np.array_equal(inputs[row, : len(clip)], usual)
            chosen.append(is_own)
    # 600 draws: five deviations of a binomial around 0.3
    assert 0.2 < np.mean(chosen) < 0.4
    assert all(0 < np.sum(chosen[row :: len(clips)]) < 100 for row in range(len(clips)))


def test_louder_clips_are_louder_by_as_much_in_every_band_and_calibrated_ones_are_not(clips: ClipFrames) -> None:
    own = [Normalization((-30.0,) * 64, (5.0,) * 64)] * len(clips)
    source = excerpts(clips, CONSTANT, 90, choices=Choices([CONSTANT] * len(clips), own, share=0.5, loudness=6.0))
    random, gains = np.random.default_rng(4), []
    for _ in range(50):
        source.begin(random)
        inputs = source.batch(torch.arange(len(clips)), random).inputs[:, 0].numpy()
        for row, clip in enumerate(clips):
            heard = inputs[row, : len(clip)]
            if np.array_equal(heard, own[row].apply(clip)):
                continue
            gain = 10 * (heard - CONSTANT.apply(clip))
            assert np.ptp(gain) < 1e-4
            gains.append(float(gain.mean()))
    assert 100 < len(gains) < 200
    assert -6 <= min(gains) < -5.5 and 5.5 < max(gains) <= 6


def test_a_share_of_the_excerpts_is_heard_in_noise_and_no_clip_is_changed(clips: ClipFrames) -> None:
    before, source = clips.frames.copy(), excerpts(clips, CONSTANT, 90, noise=0.3)
    random, noisy = np.random.default_rng(4), []
    for _ in range(100):
        source.begin(random)
        inputs = source.batch(torch.arange(len(clips)), random).inputs[:, 0].numpy()
        for row, clip in enumerate(clips):
            heard, clean = inputs[row, : len(clip)], CONSTANT.apply(clip)
            noisy.append(not np.array_equal(heard, clean))
            assert (heard >= clean - 1e-5).all(), "powers add up"
            assert not inputs[row, len(clip) :].any()
    assert 0.2 < np.mean(noisy) < 0.4
    assert np.array_equal(clips.frames, before)


@pytest.mark.parametrize("kind", ["music", "room", "band"])
def test_a_share_of_the_excerpts_is_heard_beside_music_in_rooms_or_over_lines(
    clips: ClipFrames, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"sertool.batches.in_random_{kind}", lambda excerpt, *_: excerpt - 7)
    source, random = excerpts(clips, CONSTANT, 90, **{kind: 0.3}), np.random.default_rng(4)
    changed = []
    for _ in range(100):
        inputs = source.batch(torch.arange(len(clips)), random).inputs[:, 0].numpy()
        for row, clip in enumerate(clips):
            softer = np.array_equal(inputs[row, : len(clip)], CONSTANT.apply(clip - 7))
            assert softer or np.array_equal(inputs[row, : len(clip)], CONSTANT.apply(clip))
            changed.append(softer)
    assert 0.2 < np.mean(changed) < 0.4


def test_excerpts_are_of_all_lengths_between_the_shortest_and_the_longest(clips: ClipFrames) -> None:
    source, random = excerpts(clips, CONSTANT, 48, shortest_frames=20), np.random.default_rng(0)
    whole, lengths, ends = CONSTANT.apply(clips[1]), [], []
    for _ in range(300):
        excerpt = source.batch(torch.tensor([1]), random).inputs[0, 0].numpy()
        (at,) = [at for at in range(91 - len(excerpt)) if np.array_equal(whole[at : at + len(excerpt)], excerpt)]
        lengths.append(len(excerpt))
        ends.append(at + len(excerpt))
    assert set(lengths) == set(range(20, 49)) and max(ends) == 90


def test_clips_in_turn_are_what_the_device_makes_of_a_speaker_who_says_them_one_after_the_other(
    clips: ClipFrames,
) -> None:
    heard = hear_in_turn(clips, SPEAKERS, RUNNING, np.random.default_rng(3))
    order = np.random.default_rng(3)
    for name in ("a", "b"):
        normalizer = RunningNormalizer(RUNNING)
        for row in order.permutation([row for row in range(6) if SPEAKERS[row] == name]):
            normalizer.forget()
            assert np.array_equal(heard[row], normalizer.push(clips[row]))


def test_newcomers_are_heard_as_if_nobody_had_spoken_before(clips: ClipFrames) -> None:
    heard = hear_in_turn(clips, SPEAKERS, RUNNING, np.random.default_rng(3), newcomers=1.0)
    assert all(np.array_equal(frames, RUNNING.apply(clip)) for frames, clip in zip(heard, clips, strict=True))


def test_every_epoch_hears_running_statistics_in_another_order(clips: ClipFrames) -> None:
    source = excerpts(clips, RUNNING, excerpt=90)
    seen = []
    for epoch in range(4):
        random = np.random.default_rng(epoch)
        source.begin(random)
        seen.append(source.batch(torch.arange(6), random).inputs)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])
    source.begin(np.random.default_rng(0))
    assert torch.equal(source.batch(torch.arange(6), np.random.default_rng(9)).inputs, seen[0])


def test_windows_with_context_are_the_same_windows_later() -> None:
    stored = np.random.default_rng(0).normal(-45, 12, (4, 16 + 40, 64)).astype(np.float32)
    reach = TimeReach(stride=8, context=16)
    options = {"excerpt": 0, "device": CPU}
    rows, random = torch.tensor([2, 0]), np.random.default_rng(0)
    without = Windows(stored, [3, 1, 2], reach, CONSTANT, context=0.0, **options).batch(rows, random)
    amid = Windows(stored, [3, 1, 2], reach, CONSTANT, context=1.0, **options).batch(rows, random)
    assert without.skip == 0 and amid.skip == 2
    assert torch.equal(amid.inputs[:, :, 16:], without.inputs)
    assert np.array_equal(amid.inputs[:, 0].numpy(), CONSTANT.apply(stored[[2, 3]]))


def test_an_excerpt_of_a_window_brings_its_own_context() -> None:
    stored = np.random.default_rng(0).normal(-45, 12, (1, 16 + 40, 64)).astype(np.float32)
    source = Windows(stored, [0], TimeReach(8, 16), CONSTANT, context=1.0, excerpt=24, device=CPU)
    whole = CONSTANT.apply(stored[0])
    random = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        batch = source.batch(torch.tensor([0]), random)
        assert batch.inputs.shape == (1, 1, 40, 64) and batch.skip == 2
        found |= {at for at in range(17) if np.array_equal(whole[at : at + 40], batch.inputs[0, 0].numpy())}
    assert found == set(range(17))


def test_padded_clips_pool_as_each_alone() -> None:
    torch.manual_seed(0)
    network = build_network("cnn6", 3, "causal", width=0.125).eval()
    clips = [np.random.default_rng(n).normal(size=(n, 64)).astype(np.float32) for n in (32, 80, 57)]
    inputs, lengths = padded(clips)
    with torch.no_grad():
        together = network.pool(torch.from_numpy(inputs)[:, None], count=torch.from_numpy(lengths // 16))
        for row, clip in enumerate(clips):
            alone = network.pool(torch.from_numpy(clip[: len(clip) // 16 * 16])[None, None])
            assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_a_window_is_kept_of_a_long_clip_where_it_is_longer_than_a_segment(
    tones: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("SERTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr("sertool.features.LONGEST_CLIP_S", 0.2)
    manifest = load_manifest(tones.manifest)
    samples = manifest.clips[5].read()
    for window_samples, kept in ((0, 3200), (1600, 3200), (6400, 6400), (16640, 9600)):
        found = log_mel_clips(manifest, FrontEnd(), 1, window_samples=window_samples)
        assert np.array_equal(found[5], log_mel(samples[:kept]))


def test_clips_are_kept_as_they_are_and_short_ones_repeated(tones: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("SERTOOL_CACHE", str(tmp_path))
    manifest = load_manifest(tones.manifest)
    told: list[tuple[int, int]] = []
    found = log_mel_clips(manifest, FrontEnd(), 16, lambda done, count: told.append((done, count)))
    assert np.array_equal(found[5], log_mel(manifest.clips[5].read()))
    assert told[-1] == (72, 72) and len(found) == 72
    tiled = log_mel_clips(manifest, FrontEnd(), 50)
    samples = manifest.clips[5].read()
    assert np.array_equal(tiled[5], log_mel(np.resize(samples, FrontEnd().samples(50))))
    told.clear()
    again = log_mel_clips(manifest, FrontEnd(), 16, lambda done, count: told.append((done, count)))
    assert not told and np.array_equal(again.frames, found.frames)
    assert measure_normalization(found).mean == pytest.approx(found.frames.mean(0, dtype=np.float64))


def test_damaged_frames_on_disk_are_one_line(tones: Any, monkeypatch: Any, tmp_path: Path) -> None:
    from edge_runtime.errors import SerError

    monkeypatch.setenv("SERTOOL_CACHE", str(tmp_path))
    manifest = load_manifest(tones.manifest)
    log_mel_clips(manifest, FrontEnd(), 16)
    for suffix in ("f32", "npy"):
        (cached,) = cache_folder().glob(f"log-mel-*.{suffix}")
        whole = cached.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-64]):
            cached.write_bytes(damaged)
            with pytest.raises(SerError, match="damaged; delete it"):
                log_mel_clips(manifest, FrontEnd(), 16)
        cached.write_bytes(whole)
    (frames,) = cache_folder().glob("log-mel-*.f32")
    frames.unlink()
    with pytest.raises(SerError, match="damaged; delete it"):
        log_mel_clips(manifest, FrontEnd(), 16)


DEVICE = {
    "data__clips": "once",
    "network__time_padding": "causal",
    "network__name": "resnet9",
    "network__width": 0.125,
    "training__schedule": "cosine",
    "training__warmup_epochs": 1.0,
    "training__average": 0.9,
    "training__label_smoothing": 0.1,
    "training__weight_decay": 0.01,
    "training__epochs": 25,
}
AUGMENTED = {"masks": 1, "mask_frames": 6, "warp": 0.05, "mixup": 0.3, "newcomers": 0.4, "excerpt_frames": 32}


def device_recipe(tones: Any, **values: object) -> Any:
    from sertool.recipe import parse_recipe

    content = tones.recipe(**(DEVICE | values)).model_dump()
    content["normalization"] = {"kind": "running", "prior": 1.0}
    content["augmentation"] = AUGMENTED
    return parse_recipe(content)


@pytest.fixture(scope="module")
def trained(tones: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sertool.fit import fit

    folder = tmp_path_factory.mktemp("device") / "run"
    fit(device_recipe(tones), folder)
    return folder


def test_a_training_as_the_device_hears_learns_and_resumes_to_the_same_weights(
    tones: Any, trained: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from sertool.fit import EpochReport, fit

    def stop(report: EpochReport) -> None:
        if report.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(device_recipe(tones), tmp_path / "run", on_epoch=stop)
    fit(device_recipe(tones), tmp_path / "run")
    one, other = (load_file(folder / "checkpoint.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_in_turn_is_another_protocol_beside_the_first(tones: Any, trained: Path, sertool: Any) -> None:
    import json

    from sertool.run import load_run

    for options in ([], ["--in-turn"]):
        outcome = sertool("evaluate", trained, *options)
        assert outcome.code == 0, outcome.err
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) == {"test", "test-in-turn"}
    assert metrics["test"]["uar"] > 0.6 and metrics["test-in-turn"]["uar"] > 0.6
    assert (trained / "predictions-test-in-turn.csv").is_file() and (trained / "report-test-in-turn.html").is_file()
    assert load_run(trained).normalization.prior_frames == 62


def test_in_turn_with_constants_is_refused(tones: Any, tmp_path: Path, sertool: Any) -> None:
    from sertool.fit import fit

    fit(tones.recipe(training__epochs=1), tmp_path / "run")
    outcome = sertool("evaluate", tmp_path / "run", "--in-turn")
    assert outcome.code == 2 and "leave --in-turn out" in outcome.err


def test_the_device_hears_the_run_in_turn_as_the_desk_does(
    tones: Any, trained: Path, tmp_path: Path, sertool: Any
) -> None:
    """The exported stream, fed clip after clip with one normaliser, gives the probabilities of ``--in-turn``."""
    from edge_runtime.recognizer import Recognizer
    from sertool.evaluate import TURNS_SEED, evaluate_run
    from sertool.run import load_run

    run = load_run(trained)
    sertool("evaluate", trained)
    outcome = sertool("export", trained, "-o", tmp_path / "m.onnx", "--precision", "fp32", "--form", "stream")
    assert outcome.code == 0, outcome.err
    recognizer = Recognizer(tmp_path / "m.onnx")
    found = evaluate_run(run, known="in-turn")
    row_of = {key: row for row, key in enumerate(found.keys)}
    clips = run.clips("test")
    random = np.random.default_rng(TURNS_SEED)
    for speaker in sorted({clip.speaker for clip in clips}):
        normalizer = RunningNormalizer(recognizer.artifact.normalization)
        own = [clip for clip in clips if clip.speaker == speaker]
        for position in random.permutation(len(own)):
            normalizer.forget()
            stream = recognizer.stream(normalizer=normalizer)
            stream.push(own[position].read())
            logits = torch.from_numpy(stream.logits())
            expected = found.probabilities[row_of[own[position].key]]
            assert logits.softmax(0).numpy() == pytest.approx(expected, abs=1e-4)


def test_a_run_of_constants_is_no_start_for_running_statistics(tones: Any, tmp_path: Path) -> None:
    from sertool.fit import fit

    plain = {
        "network__time_padding": "causal",
        "network__name": "resnet9",
        "network__width": 0.125,
        "training__epochs": 1,
    }
    fit(tones.recipe(**plain), tmp_path / "constants")
    further = device_recipe(tones, training__start=str(tmp_path / "constants"))
    with pytest.raises(UsageError, match=r"its normalization\.kind is 'constant', not 'running'"):
        fit(further, tmp_path / "further")


# --- memory --------------------------------------------------------------------------------------------------------

HELD = """
import sys
from pathlib import Path
import numpy as np
import torch
from sertool import batches
from sertool.corpora.manifest import Clip, Manifest
from sertool.features import ClipFrames
from sertool.networks import build_network
from sertool.recipe import parse_recipe

folder, count, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
stored = np.memmap(folder / f"{count}-{kind}", np.float32, "w+", shape=(count, 400, 64))  # a file of holes: no disk
batches.log_mel_windows = lambda *_: stored
batches.log_mel_clips = lambda *_: ClipFrames.of_windows(np.asarray(stored))
clips = tuple(Clip(str(row), Path(str(row)), str(row % 7), "joy") for row in range(count))
recipe = parse_recipe({
    "data": {"manifest": "m.csv", "split": "s.json", "clips": kind},
    "network": {"name": "mobilenet15", "time_padding": "causal", "width": 0.25},
    "augmentation": {"excerpt_frames": 192},
})
network = build_network("mobilenet15", 3, "causal", width=0.25)
random = np.random.default_rng(0)
inputs, _ = batches.training_inputs(
    recipe, Manifest(clips, Path("m.csv")), list(range(count)), network, None, torch.device("cpu")
)
inputs.begin(random)
for start in range(0, count, 16):
    inputs.batch(torch.arange(start, min(start + 16, count)), random)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["RssAnon"].split()[0]) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["once", "tiled"])
def test_memory_does_not_grow_with_the_corpus(kind: str, tmp_path: Path) -> None:
    def held(count: int) -> int:
        command = [sys.executable, "-c", HELD, str(tmp_path), str(count), kind]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    few, many = held(64), held(2048)
    assert many - few < 15e6, "of spectrograms of 203 MB more"
