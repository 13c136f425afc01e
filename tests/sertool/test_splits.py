import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from sertool.corpora.adapters import corpus_clips, corpus_named
from sertool.corpora.manifest import Clip, Manifest
from sertool.corpora.splits import PARTS, Fold, Split, check_split, load_split, make_split


def corpus(women: int, men: int, unknown: int = 0, labels: tuple[str, ...] = ("anger", "fear")) -> Manifest:
    genders = [*["f"] * women, *["m"] * men, *[""] * unknown]
    clips = [
        Clip(f"{number:03d}-{label}.wav", Path("x"), f"s{number:03d}", label, gender)
        for number, gender in enumerate(genders)
        for label in labels
    ]
    return Manifest(tuple(clips), Path("manifest.csv"))


def women_and_men(manifest: Manifest, speakers: tuple[str, ...]) -> tuple[int, int]:
    genders = Counter(manifest.genders[speaker] for speaker in speakers)
    return genders["f"], genders["m"]


protocols = st.one_of(
    st.just("loso"),
    st.integers(2, 6).map(lambda k: f"kfold:{k}"),
    st.sampled_from(["fractions:.4,.3,.3", "fractions:0.6,0.2,0.2", "fractions:.5,0,.5"]),
)


@given(st.integers(3, 25), st.integers(3, 25), st.integers(0, 5), protocols, st.integers(0, 99))
def test_every_split_divides_speakers_and_balances_genders(women, men, unknown, protocol, seed):
    manifest = corpus(women, men, unknown)
    split = make_split(manifest, protocol, seed)
    for fold in split.folds:
        speakers = [speaker for part in PARTS for speaker in fold.part(part)]
        assert sorted(speakers) == manifest.speakers
    if protocol.startswith(("loso", "kfold")):
        tested = [speaker for fold in split.folds for speaker in fold.test]
        assert sorted(tested) == manifest.speakers
        assert not any(fold.validation for fold in split.folds)
    if unknown == 0 and protocol != "loso":
        for fold in split.folds:
            for part in PARTS:
                share = len(fold.part(part)) / (women + men)
                got = women_and_men(manifest, fold.part(part))
                assert abs(got[0] - women * share) <= 1.01
                assert abs(got[1] - men * share) <= 1.01


@given(st.integers(0, 1000), protocols)
def test_the_order_of_the_rows_does_not_matter(seed, protocol):
    manifest = corpus(6, 5)
    shuffled = list(manifest.clips)
    random.Random(seed).shuffle(shuffled)
    assert make_split(Manifest(tuple(shuffled), manifest.path), protocol, seed) == make_split(manifest, protocol, seed)


def test_another_seed_gives_another_split_and_loso_the_same():
    manifest = corpus(12, 12)
    assert len({make_split(manifest, "fractions:.4,.3,.3", seed).hash for seed in range(20)}) == 20
    assert len({make_split(manifest, "loso", seed).hash for seed in range(20)}) == 1


def test_the_split_is_the_same_in_another_process_with_another_hash_seed():
    program = (
        "from pathlib import Path; from sertool.corpora.manifest import *; from sertool.corpora.splits import *;"
        "clips = tuple(Clip(f'{n}', Path('x'), f's{n:03d}', 'anger', 'fm'[n % 2]) for n in range(24));"
        "print(make_split(Manifest(clips, Path('m')), 'paper', 7).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_paper_on_ravdess_sizes():
    manifest = corpus(12, 12)
    (fold,) = make_split(manifest, "paper", 3).folds
    assert [women_and_men(manifest, fold.part(part)) for part in PARTS] == [(5, 5), (4, 4), (3, 3)]


def test_paper_on_demos_sizes():
    manifest = corpus(23, 45)
    (fold,) = make_split(manifest, "paper", 0).folds
    assert [women_and_men(manifest, fold.part(part)) for part in PARTS] == [(9, 18), (7, 18), (7, 9)]


def test_paper_takes_the_speakers_in_the_order_of_their_hashes():
    manifest = corpus(12, 12)
    (fold,) = make_split(manifest, "paper", 5).folds
    women = [f"s{number:03d}" for number in range(12)]
    women.sort(key=lambda speaker: hashlib.sha256(f"5:{speaker}".encode()).hexdigest())
    assert set(women[:5]) <= set(fold.train)
    assert set(women[5:9]) <= set(fold.validation)
    assert set(women[9:]) <= set(fold.test)


def test_five_folds_of_five_women_and_five_men_hold_one_of_each():
    manifest = corpus(5, 5)
    for seed in range(10):
        for fold in make_split(manifest, "kfold:5", seed).folds:
            assert women_and_men(manifest, fold.test) == (1, 1)


def test_each_corpus_of_a_joined_manifest_tests_once():
    clips = [
        Clip(f"{number}-{label}.wav", Path("x"), f"{name}/{number}", label)
        for name in ("one", "two", "three")
        for number in range(2)
        for label in ("anger", "fear")
    ]
    folds = make_split(Manifest(tuple(clips), Path("joined.csv")), "loco").folds
    assert [fold.test for fold in folds] == [(f"{name}/0", f"{name}/1") for name in ("one", "three", "two")]
    assert all(len(fold.train) == 4 and not fold.validation for fold in folds)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ("loco", "one corpus only; join it with others first"),
        ("loco:2", "is not known"),
        ("losso", "did you mean 'loso'"),
        ("loso:3", "is not known"),
        ("paper", r"defined for RAVDESS \(12 women, 12 men\) and DEMoS .* has 3 and 3 of 6"),
        ("kfold", "K must be a whole number from 2 to 6"),
        ("kfold:7", "K must be a whole number from 2 to 6"),
        ("kfold:1", "K must be a whole number from 2 to 6"),
        ("kfold:-2", "K must be a whole number"),
        ("fractions:.4,.3,.4", "sum to 1"),
        ("fractions:.5,.5", "give three shares"),
        ("fractions:a,b,c", "give three shares"),
        ("fractions:nan,.5,.5", "give three shares"),
        ("fractions:1,0,0", "only validation may be 0"),
        ("fractions:1.5,-1,.5", "give three shares"),
        ("fractions:.98,.01,.01", "no speaker left for validation"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(protocol, message):
    with pytest.raises(UsageError, match=message):
        make_split(corpus(3, 3), protocol)


def test_a_single_speaker_cannot_be_split():
    with pytest.raises(UsageError, match="one speaker only, 's000'"):
        make_split(corpus(1, 0), "loso")


def test_a_training_part_without_a_label_is_refused_by_name():
    clips = (*corpus(3, 3).clips, Clip("x.wav", Path("x"), "s002", "guilt", "f"))
    manifest = Manifest(clips, Path("manifest.csv"))
    with pytest.raises(UsageError, match=r"fold 3 of loso trains without 'guilt' \(speakers with 'guilt': s002\)"):
        make_split(manifest, "loso")
    trains_on_it = Split("by hand", 0, (Fold(("s002", "s003"), (), ("s001",)),))
    check_split(trains_on_it, manifest)


def test_a_split_of_other_speakers_is_refused():
    split = Split("by hand", 0, (Fold(("s000",), (), ("s9",)),))
    with pytest.raises(UsageError, match="no clip of speaker 's9'"):
        check_split(split, corpus(2, 2))


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (Fold(("a", "b"), ("c",), ("d", "b")), "fold 1: speaker 'b' stands in train and in test"),
        (Fold(("a",), ("c",), ("c",)), "speaker 'c' stands in validation and in test"),
        (Fold(("a", "a"), (), ("c",)), "speaker 'a' stands in train and in train"),
        (Fold((), (), ("c",)), "no speaker in train"),
        (Fold(("a",), ("c",), ()), "no speaker in test"),
    ],
)
def test_no_split_shares_a_speaker_or_lacks_a_part(fold, message):
    with pytest.raises(UsageError, match=message):
        Split("by hand", 0, (fold,))


def test_what_is_saved_is_what_is_loaded(tmp_path):
    manifest = corpus(6, 6)
    for protocol in ("loso", "kfold:4", "fractions:.5,.25,.25"):
        split = make_split(manifest, protocol, 2)
        split.save(tmp_path / "split.json")
        assert load_split(tmp_path / "split.json") == split
        stored = json.loads((tmp_path / "split.json").read_text())
        assert stored["hash"] == split.hash


def test_the_hash_is_that_of_the_canonical_json_of_the_folds():
    split = Split("by hand", 0, (Fold(("a", "b"), (), ("ü",)),))
    canonical = '[{"test":["\\u00fc"],"train":["a","b"],"validation":[]}]'
    assert split.hash == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert Split("loso", 9, split.folds).hash == split.hash


def test_a_split_written_by_hand_needs_only_folds(tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"folds": [{"train": ["b", "a"], "test": ["c"]}]}')
    split = load_split(path)
    assert (split.protocol, split.folds) == ("by hand", (Fold(("a", "b"), (), ("c",)),))


def test_an_edit_that_leaves_the_hash_is_refused_and_told_how_to_stand(tmp_path):
    path = tmp_path / "split.json"
    split = make_split(corpus(2, 2), "loso")
    split.save(path)
    path.write_text(path.read_text().replace('"train": ["s001", ', '"train": [', 1))
    with pytest.raises(UsageError, match=r'edited after its hash was taken .* delete the line "hash"'):
        load_split(path)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"hash"' not in line))
    assert load_split(path).hash != split.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"folds": [{"train": ["a"], "test": ["b"]}', "not JSON"),
        ("[]", "not an object"),
        ("{}", 'no list "folds"'),
        ('{"folds": []}', "no fold"),
        ('{"folds": [{"train": ["a"], "tests": ["b"]}]}', "unknown key 'tests'; did you mean 'test'"),
        ('{"folds": [{"train": ["a"], "test": [3]}]}', "speakers in quotes"),
        ('{"folds": [{"train": "a", "test": ["b"]}]}', "speakers in quotes"),
        ('{"folds": [{"train": ["a"], "test": ["a"]}]}', "speaker 'a' stands in train and in test"),
        ('{"seed": "x", "folds": [{"train": ["a"], "test": ["b"]}]}', "whole number"),
    ],
)
def test_a_file_that_is_no_split_is_refused(tmp_path, text, message):
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_split(path)
    assert str(path) in str(caught.value)


def test_binary_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such split"):
        load_split(tmp_path / "absent.json")
    (tmp_path / "noise.json").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="not JSON"):
        load_split(tmp_path / "noise.json")


@pytest.mark.corpora
@pytest.mark.skipif("SERTOOL_DATA" not in os.environ, reason="SERTOOL_DATA is not set")
def test_paper_on_the_real_ravdess_gives_600_480_360_clips_half_by_women():
    clips = corpus_clips(corpus_named("ravdess"), Path(os.environ["SERTOOL_DATA"]) / "corpora" / "ravdess")
    manifest = Manifest(tuple(clips), Path("ravdess.csv"))
    (fold,) = make_split(manifest, "paper", 0).folds
    for part, size in zip(PARTS, (600, 480, 360), strict=True):
        genders = Counter(manifest.clips[row].gender for row in manifest.indices(list(fold.part(part))))
        assert genders == {"f": size / 2, "m": size / 2}


@pytest.mark.parametrize(
    ("protocol", "warned"),
    [("fractions:.6,.2,.2", "tests 2 speakers only"), ("fractions:.4,.3,.3", ""), ("loso", ""), ("kfold:5", "")],
)
def test_a_single_cut_with_few_test_speakers_is_warned_of(sertool, tmp_path, protocol, warned):
    corpus(5, 5).save(tmp_path / "m.csv")
    outcome = sertool("split", "make", tmp_path / "m.csv", "--protocol", protocol, "-o", tmp_path / "s.json")
    assert outcome.code == 0 and (tmp_path / "s.json").is_file()
    assert bool(outcome.err) == bool(warned) and warned in outcome.err


def test_one_test_speaker_is_singular(sertool, tmp_path):
    corpus(2, 2).save(tmp_path / "m.csv")
    outcome = sertool(
        "split", "make", tmp_path / "m.csv", "--protocol", "fractions:.5,.25,.25", "-o", tmp_path / "s.json"
    )
    assert "tests 1 speaker only, " in outcome.err


def test_unknown_genders_are_a_dash_and_brackets_stay(sertool, tmp_path):
    corpus(0, 0, 4, labels=("[red]anger", "fear")).save(tmp_path / "m.csv")
    sertool("split", "make", tmp_path / "m.csv", "--protocol", "kfold:2", "-o", tmp_path / "s.json")
    shown = sertool("split", "show", tmp_path / "s.json", tmp_path / "m.csv").out
    assert "[red]anger 2" in shown and "0/0" not in shown
    assert " - " in shown


class CountedClips(tuple):
    """Clips that know how often they were gone through."""

    passes = 0

    def __iter__(self):
        type(self).passes += 1
        return super().__iter__()


def test_clips_are_gone_through_a_few_times_however_many_folds_there_are():
    clips = CountedClips(
        Clip(f"{speaker}-{label}.wav", Path(f"{speaker}-{label}.wav"), f"{speaker:03d}", label)
        for speaker in range(100)
        for label in ("joy", "fear")
    )
    split = make_split(Manifest(clips, Path("large.csv")), "loso")
    assert len(split.folds) == 100
    assert 0 < CountedClips.passes < 10
