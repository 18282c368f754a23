"""The sounds of the pretrained benchmark have the pitch that they say, and it is read as CREPE's authors do."""

import numpy as np
import pytest
import torch

from benchmarks.accuracy import sounds
from benchmarks.accuracy.pretrained import cents

PERIOD = 80  # samples
KINDS = (*sounds.DECIDING, *sounds.TESTING)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_a_steady_sound_repeats_after_its_period_and_not_before(kind: sounds.Timbre) -> None:
    tone = kind(np.random.default_rng(0), np.full(sounds.LENGTH, sounds.RATE / PERIOD))
    late = tone[sounds.LENGTH // 2 :]  # brass swells, strings fade
    alike = [np.corrcoef(late[:-lag], late[lag:])[0, 1] for lag in range(PERIOD // 8, PERIOD + 1)]
    assert alike[-1] > 0.98
    assert max(alike[: -PERIOD // 8]) < 0.97


def test_pitches_vary_and_stay_near_the_range() -> None:
    random = np.random.default_rng(1)
    pitches = [sounds.sound(random, sounds.sine)[1] for _ in range(60)]
    ranges = np.array([1200 * np.log2(pitch.max() / pitch.min()) for pitch in pitches])
    assert (ranges == 0).any()
    assert ((ranges > 20) & (ranges < 300)).any()
    assert min(pitch.min() for pitch in pitches) > sounds.LOWEST * 2 ** (-150 / 1200)
    assert max(pitch.max() for pitch in pitches) < sounds.HIGHEST * 2 ** (150 / 1200)
    assert np.ptp([np.log2(pitch.mean()) for pitch in pitches]) > 3


def test_the_pitch_is_the_mean_of_the_bins_around_the_highest() -> None:
    salience = torch.zeros(3, 360)
    salience[0, 100] = 0.5
    salience[1, [100, 101, 200]] = torch.tensor([0.6, 0.2, 0.5])  # a second peak far off does not count
    salience[2, 0] = 1.0
    lowest = 1200 * np.log2(31.7 / 10)  # Hz, of bin 0
    expected = [2000, 2000 + 20 * 0.2 / 0.8, 0]
    np.testing.assert_allclose(cents(salience).numpy() - lowest, expected, atol=1)
