"""Constants of each speaker's own calm speech, as ``ser-edge calibrate`` measures them on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.calibrate import LEAST_S, constants_of, sums_of
from edge_runtime.frontend import FrontEnd, Normalization
from sertool.features import ClipFrames
from sertool.recipe import Normalizing

ORDER_SEED = 0
"""Of the order in which a speaker's calm clips are taken."""


def personal_constants(
    clips: ClipFrames,
    speakers: Sequence[str],
    labels: Sequence[str],
    usual: Sequence[Normalization],
    settings: Normalizing,
    front_end: FrontEnd,
) -> list[Normalization]:
    """Return how each clip is normalised on a device that was calibrated to its speaker.

    That is by mean and deviation of the speaker's clips labelled ``settings.personal_label``, taken in random order
    until ``settings.personal_seconds`` are full. The clip itself is never among them: a device is calibrated before.

    Args:
        clips: dB.
        speakers: of each clip.
        labels: of each clip.
        usual: of each clip, for those whose speaker has less than 5 s of such speech otherwise.
        settings: which speech, and how much of it.
        front_end: of the clips.

    Returns:
        constants for each clip.

    Example:
        >>> clips = ClipFrames(np.repeat(np.arange(4.0), 1000)[:, None].astype(np.float32), np.arange(1, 5) * 1000)
        >>> calm = Normalizing(personal_label="calm", personal_seconds=5.0)
        >>> usual = 4 * [Normalization((9.0,), (1.0,))]
        >>> found = personal_constants(clips, 4 * ["ada"], ["calm", "joy", "joy", "calm"], usual, calm, FrontEnd())
        >>> [each.mean for each in found]
        [(3.0,), (0.0,), (0.0,), (0.0,)]
    """
    enough, least = (round(seconds * front_end.frame_rate) for seconds in (settings.personal_seconds, LEAST_S))
    calm = _calm_rows(speakers, labels, settings.personal_label)
    sums = {row: sums_of(clips[row]) for rows in calm.values() for row in rows}
    found: dict[tuple[int, ...], Normalization] = {}
    chosen = []
    for row, speaker in enumerate(speakers):
        others = [other for other in calm.get(speaker, ()) if other != row]
        frames = np.cumsum([0, *(len(clips[other]) for other in others)])
        taken = tuple(others[: int(np.searchsorted(frames, enough))])
        if taken not in found and frames[len(taken)] >= least:
            found[taken] = constants_of(np.sum([sums[other] for other in taken], axis=0), int(frames[len(taken)]))
        chosen.append(found.get(taken, usual[row]))
    return chosen


def _calm_rows(speakers: Sequence[str], labels: Sequence[str], calm: str) -> dict[str, list[int]]:
    """Return the calm clips of each speaker, in random order."""
    rows: dict[str, list[int]] = {}
    for row in np.random.default_rng(ORDER_SEED).permutation(len(speakers)).tolist():
        if labels[row] == calm:
            rows.setdefault(speakers[row], []).append(row)
    return rows
