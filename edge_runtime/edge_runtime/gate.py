"""The energy gate: which short blocks of audio are loud enough, against the room, to be speech.

It exists to spare the network silence, not to tell speech from other sounds.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from edge_runtime.frontend import FloatArray

BLOCK = 512
"""Samples per decision: 32 ms at 16 kHz, about the length of a vowel's shortest part."""

FLOOR_BLOCKS = 94
"""Blocks whose quietest is the noise floor: 3 s hold a pause or a closure in any speech."""

START_FLOOR_DB = -60.0
"""Noise floor assumed before anything was heard, so that a recording may begin in the middle of a word."""

START_BLOCKS = 16
"""Blocks for which that assumption holds: 0.5 s, too short for a noisy room's start to become a segment."""

LOWEST_DB = -100.0


def level_db(block: FloatArray) -> float:
    """Return the level of a block in dBFS (a full-scale square wave has 0), without its DC offset; at least -100.

    Example:
        >>> round(level_db(np.tile(np.array([0.1, -0.1], np.float32), 256)))
        -20
    """
    # block.var() would be a quarter of all that listening to a quiet room costs.
    centred = block - np.add.reduce(block) / len(block)
    return 10.0 * math.log10(max(float(np.dot(centred, centred)) / len(block), 10.0 ** (LOWEST_DB / 10.0)))


class Gate:
    """Compares each block with a noise floor that follows the room.

    The floor is the quietest block of the last 3 seconds (minimum statistics; R. Martin, IEEE Trans. Speech and
    Audio Processing 9(5), 2001): speech always dips, so a louder fan becomes the floor within 3 seconds and speech
    does not. Digital silence (a muted microphone, a synthetic pause) says nothing about the room and is left out,
    else every noise after it would pass for speech.

    Args:
        margin: see the attributes.
        minimum: see the attributes.

    Attributes:
        margin: dB above the floor from which a block is speech; may be changed.
        minimum: dBFS below which no block is speech; may be changed.
        level: level of the last block, dBFS.

    Example:
        >>> gate = Gate(margin=9.0, minimum=-60.0)
        >>> gate.is_speech(np.zeros(BLOCK, np.float32))
        False
        >>> gate.is_speech(np.sin(np.arange(BLOCK) / 5).astype(np.float32))
        True
    """

    def __init__(self, margin: float, minimum: float) -> None:
        self.margin = margin
        self.minimum = minimum
        self.reset()

    def reset(self) -> None:
        """Forget the room."""
        self.level = LOWEST_DB
        # The oldest entries leave first: the assumed floor lasts START_BLOCKS blocks.
        start = [START_FLOOR_DB] * START_BLOCKS + [float("inf")] * (FLOOR_BLOCKS - START_BLOCKS)
        self._levels = deque(start, maxlen=FLOOR_BLOCKS)

    @property
    def floor(self) -> float:
        """The noise floor, dBFS."""
        return min(self._levels)

    @property
    def threshold(self) -> float:
        """The level from which a block is speech, dBFS."""
        return max(self.floor + self.margin, self.minimum)

    def is_speech(self, block: FloatArray) -> bool:
        """Judge the next ``BLOCK`` samples, in [-1, 1]."""
        self.level = level_db(block)
        if self.level > LOWEST_DB:
            self._levels.append(self.level)
        return self.level >= self.threshold
