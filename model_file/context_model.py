"""How likely each symbol of a weight tensor is, given those before it.

In a trained kernel zeros lie beside zeros, a filter or an input channel that has many has more of
them, and neighbouring weights tend to have one sign. How strong this is the model learns while it
codes, so a file holds no table of it. It computes with integers only: reader and writer must arrive
at exactly the same probabilities, on any machine.
"""

import functools
import math

import numpy as np

from model_file.range_coder import ONE

OCTAVE = 16  # logarithms here are integers, in sixteenths of an octave: 16 log2(x)
SEEN = 32  # what an observed bit adds to its count
FIRST = 8 * SEEN  # a new context's counts add up to this: what it starts from is worth 8 bits seen

# A quarter more or less of any changes no size by 1 % on our model pruned to 70, 80 and 85 %.
NEIGHBOUR = 32  # what a non-zero left or upper neighbour adds to the log odds of "not zero"
KERNEL = 6  # what each non-zero of the same kernel adds
POSITION = -2  # what each position that is coded adds, to offset KERNEL
FILTER, CHANNEL, BY = 10, 8, 16  # weights, in sixteenths, of what either has had so far


def _root16(x):
    return math.isqrt(math.isqrt(math.isqrt(math.isqrt(x))))  # rounded down, exactly


@functools.cache
def _thresholds():
    return np.array([_root16(2**v - 1) + 1 for v in range(1, 48 * OCTAVE)])


def _log(x):
    """Return floor(16 log2 x) of integers from 1 to 2^47."""
    return np.searchsorted(_thresholds(), x, side="right")


@functools.cache
def _exp(v):
    """Return floor(2^16 * 2^(v / 16)), an integer, for an integer v >= -256."""
    return _root16(2 ** (v + 16 * OCTAVE))


def log_odds(nonzeros, size):
    """Return about 16 log2(non-zeros / zeros) of `size` symbols, an integer from -127 to 127."""
    return int(np.clip(_log(2 * nonzeros + 1) - _log(2 * (size - nonzeros) + 1), -127, 127))


class _Contexts:
    """Counts of zeros and ones in each context, and so the probability of the next bit there."""

    def __init__(self, starts):
        """starts: the log odds of a one that each context begins with."""
        odds = np.array([_exp(min(max(v, -8 * OCTAVE), 8 * OCTAVE)) for v in starts])
        ones = np.maximum(FIRST * odds // (odds + 2**16), 1)
        self.counts = np.stack([FIRST - ones, ones], axis=1)

    def fade(self):
        """Keep the probabilities, but let them change as easily as at the start."""
        ones = np.clip(FIRST * self.counts[:, 1] // self.counts.sum(1), 1, FIRST - 1)
        self.counts = np.stack([FIRST - ones, ones], axis=1)

    def code(self, coder, contexts, bits):
        """Encode `bits`, or decode one for each context; return them (0 or 1), counted."""
        counts = self.counts[contexts]
        bits = coder(np.clip(ONE * counts[:, 1] // counts.sum(1), 1, ONE - 1), bits)
        for bit in (0, 1):
            seen = np.bincount(contexts[bits == bit], minlength=len(self.counts))
            self.counts[:, bit] += SEEN * seen
        return bits


class ContextModel:
    """Codes arrays of symbols by a RangeEncoder or RangeDecoder, and learns from each for the next.

    A symbol is told as: zero or not; its sign; its distance from zero minus one, in bits, the
    highest first. One kernel position after another is coded, for all kernels of the array at once.
    """

    def __init__(self, coder):
        self.coder = coder
        self.scores = range(-24 * OCTAVE, 24 * OCTAVE + 1, OCTAVE // 2)  # a context each
        self.nonzero = _Contexts(self.scores)
        self.sign = _Contexts([0] * 27)  # of three neighbours: -, 0 or + each
        self.distances = {}  # {number of contexts: _Contexts}

    def code(self, alphabet, density, symbols=None):
        """Encode `symbols`, or decode them if None; return them, a flat int64 array.

        alphabet: a coders.Alphabet, of any shape; one that is not (out, in, height, width) counts
        as (out, in, 1, 1). density: what log_odds gives for the array.
        """
        height, width = alphabet.shape[2:] if len(alphabet.shape) == 4 else (1, 1)
        n_out, n_in = alphabet.shape[0], alphabet.size // (alphabet.shape[0] * height * width)
        farthest = max(alphabet.zero, alphabet.n_levels - 1 - alphabet.zero)
        n_contexts = 2 << (farthest - 1).bit_length()
        distance = self.distances.setdefault(n_contexts, _Contexts([0] * n_contexts))
        distance.fade()  # each array has its own scale
        values = np.zeros((n_out, n_in, height * width), np.int64)
        wanted = values if symbols is None else symbols.reshape(values.shape) - alphabet.zero
        for p in range(height * width):
            row, column = divmod(p, width)  # left, upper, upper left; 0 beyond the border
            inside = ((column, p - 1), (row, p - width), (row and column, p - width - 1))
            neighbours = np.stack([values[:, :, at] if is_in else np.zeros((n_out, n_in), np.int64)
                                   for is_in, at in inside])
            score = _score(density, values[:, :, :p] != 0)
            score = score + NEIGHBOUR * (neighbours[:2] != 0).sum(0)
            values[..., p] = self._position(alphabet, score, neighbours, distance, wanted[..., p])
        return (values + alphabet.zero).ravel()

    def _position(self, alphabet, score, neighbours, distance, wanted):
        """Code one position of all kernels, (out, in); return the values, symbols minus zero."""
        context = (score // self.scores.step + len(self.scores) // 2).clip(0, len(self.scores) - 1)
        nonzero = self.nonzero.code(self.coder, context.ravel(), wanted.ravel() != 0) == 1
        kept, n = wanted.ravel()[nonzero], int(nonzero.sum())
        if 0 < alphabet.zero < alphabet.n_levels - 1:
            context = np.array([9, 3, 1]) @ (np.sign(neighbours) + 1).reshape(3, -1)[:, nonzero]
            positive = self.sign.code(self.coder, context, kept > 0)
        else:
            positive = np.full(n, int(alphabet.zero == 0))
        node = np.ones(n, np.int64)  # in the tree of distances: 1 and the bits that are known
        n_bits = (len(distance.counts) // 2).bit_length() - 1
        for shift in range(n_bits - 1, -1, -1):
            bits = (abs(kept) - 1) >> shift & 1
            node = 2 * node + distance.code(self.coder, 2 * node + positive, bits)
        values = np.zeros(nonzero.shape, np.int64)
        values[nonzero] = np.where(positive == 1, 1, -1) * (node - (1 << n_bits) + 1)
        return values.reshape(score.shape)


def _score(density, nonzero):
    """Return estimated log odds of "not zero" at the next position, (out, in)."""
    n_out, n_in, p = nonzero.shape
    odds = _exp(density)
    score = density + KERNEL * nonzero.sum(2) + POSITION * p
    for axis, weight, n in ((0, CHANNEL, n_out * p), (1, FILTER, n_in * p)):
        ones = nonzero.sum((axis, 2))
        # with four weights of the whole array's density: none seen does not mean never
        zeros, ones = (n - ones) * (odds + 2**16) + 4 * 2**16, ones * (odds + 2**16) + 4 * odds
        seen = _log(ones) - _log(zeros)
        score = score + np.expand_dims(weight * (seen - density) // BY, axis)
    return score
