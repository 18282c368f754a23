"""Sounds of known pitch, made from nothing: eight kinds, of which four are for decisions and four for tests.

A sound lasts half a second at 16 kHz. Its pitch is constant, glides, or has a vibrato; noise is added at 5 to 40 dB.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RATE = 16_000
LENGTH = RATE // 2
LOWEST, HIGHEST = 60.0, 1200.0  # Hz
_HIGHEST_HARMONIC = 7000.0  # Hz

Timbre = Callable[[np.random.Generator, Floats], Floats]  # of the pitch in Hz at every sample, the sound


def sound(random: np.random.Generator, timbre: Timbre) -> tuple[Floats, Floats]:
    """A sound and its pitch in Hz, at every sample: float64 [LENGTH] each."""
    pitch = _pitch(random, steady=timbre is plucked)
    tone = timbre(random, pitch)
    tone = tone / tone.std()
    return tone + 10 ** (-random.uniform(5, 40) / 20) * random.standard_normal(LENGTH), pitch


def _pitch(random: np.random.Generator, *, steady: bool) -> Floats:
    time = np.arange(LENGTH) / RATE
    middle = np.exp(random.uniform(np.log(LOWEST), np.log(HIGHEST)))
    kind = "steady" if steady else random.choice(["steady", "glide", "vibrato"])
    cents = {
        "steady": lambda: np.zeros(LENGTH),
        "glide": lambda: random.uniform(-300, 300) * (time / time[-1] - 0.5),
        "vibrato": lambda: random.uniform(20, 80) * np.sin(2 * np.pi * (random.uniform(4, 7) * time + random.random())),
    }[kind]()
    return middle * 2 ** (cents / 1200)


def _phase(random: np.random.Generator, pitch: Floats) -> Floats:
    """In turns."""
    return np.cumsum(pitch) / RATE + random.random()


def _harmonics(random: np.random.Generator, pitch: Floats, gain: Callable[[Floats], Floats]) -> Floats:
    """Harmonics with random phases below a highest frequency; gain: by their frequencies."""
    phase, total = _phase(random, pitch), np.zeros(LENGTH)
    for number in range(1, 1 + int(_HIGHEST_HARMONIC / pitch.max())):
        total += gain(number * pitch) * np.cos(2 * np.pi * (number * phase + random.random()))
    return total


def _resonances(centres: Floats, widths: Floats, frequency: Floats) -> Floats:
    """The gain of resonances beside each other."""
    return np.sum([1 / np.hypot(1, (frequency - c) / w) for c, w in zip(centres, widths, strict=True)], axis=0)


# Kinds to decide with ---------------------------------------------------------------------------------------


def harmonic(random: np.random.Generator, pitch: Floats) -> Floats:
    """A falling spectrum with random bumps, smooth in frequency."""
    slope = random.uniform(0.5, 2)
    knots = np.exp(random.normal(0, 1, 12))

    def gain(frequency: Floats) -> Floats:
        bumps = np.interp(frequency, np.linspace(0, _HIGHEST_HARMONIC, knots.size), knots)
        return bumps * (frequency / pitch) ** -slope

    return _harmonics(random, pitch, gain)


def plucked(random: np.random.Generator, pitch: Floats) -> Floats:
    """A string of Karplus and Strong, "Digital Synthesis of Plucked-String and Drum Timbres", 1983, tuned by a phase.

    What was plucked runs round in a loop that averages neighbours; each harmonic falls as it does there.
    """
    frequency, time = pitch[0], np.arange(LENGTH) / RATE
    number = np.arange(1, 1 + int(_HIGHEST_HARMONIC / frequency))
    start = random.normal(size=number.size) + 1j * random.normal(size=number.size)
    falls = np.log(np.cos(np.pi * number * frequency / RATE)) * frequency  # each second
    waves = np.exp(np.outer(time, falls)) * np.exp(2j * np.pi * np.outer(time, number * frequency))
    return (waves @ start).real


def voice(random: np.random.Generator, pitch: Floats) -> Floats:
    """A falling source through the formants of a vowel."""
    centres = np.array([random.uniform(250, 900), random.uniform(900, 2400), random.uniform(2400, 3500)])
    widths = np.array([80.0, 100.0, 150.0])
    return _harmonics(random, pitch, lambda frequency: _resonances(centres, widths, frequency) * pitch / frequency)


def organ(random: np.random.Generator, pitch: Floats) -> Floats:
    """A few harmonics, as drawbars mix them."""
    phase, numbers = _phase(random, pitch), np.array([1, 2, 3, 4, 6, 8])
    gains = np.r_[1, random.uniform(0, 1, numbers.size - 1)]
    return np.sum([g * np.sin(2 * np.pi * n * phase) for n, g in zip(numbers, gains, strict=True)], axis=0)


# Kinds to test with -----------------------------------------------------------------------------------------


def sine(random: np.random.Generator, pitch: Floats) -> Floats:
    """The pitch alone."""
    return np.sin(2 * np.pi * _phase(random, pitch))


def reed(random: np.random.Generator, pitch: Floats) -> Floats:
    """Odd harmonics, even ones much fainter."""
    slope, even = random.uniform(0.7, 1.5), random.uniform(0, 0.1)

    def gain(frequency: Floats) -> Floats:
        number = np.round(frequency / pitch)
        return np.where(number % 2 == 1, 1, even) * number**-slope

    return _harmonics(random, pitch, gain)


def brass(random: np.random.Generator, pitch: Floats) -> Floats:
    """Frequency modulation, as Chowning, "The Synthesis of Complex Audio Spectra", 1973, makes brass."""
    phase, index = 2 * np.pi * _phase(random, pitch), random.uniform(1, 4)
    swell = np.minimum(1, np.arange(LENGTH) / RATE / random.uniform(0.05, 0.3))
    return swell * np.sin(phase + index * swell * np.sin(phase))


def filtered(random: np.random.Generator, pitch: Floats) -> Floats:
    """A saw tooth through a resonance that sweeps, as in a synthesiser."""
    first, last = random.uniform(300, 4000, 2)
    centre, quality = np.linspace(first, last, LENGTH), random.uniform(1, 6)

    def gain(frequency: Floats) -> Floats:
        ratio = frequency / centre
        return pitch / frequency / np.hypot(1 - ratio**2, ratio / quality)

    return _harmonics(random, pitch, gain)


DECIDING: tuple[Timbre, ...] = (harmonic, plucked, voice, organ)
TESTING: tuple[Timbre, ...] = (sine, reed, brass, filtered)
