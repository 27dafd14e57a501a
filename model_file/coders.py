"""Arrays of small integers as bytes, and back: with a fixed width, or by their context."""

import math
from typing import NamedTuple

import numpy as np

from arguments import check
from model_file.context_model import ContextModel, log_odds
from model_file.range_coder import RangeDecoder, RangeEncoder

MAX_LEVELS = 257  # 8 bits and, beside their grid, the pruned zero


class CompressionError(ValueError):
    """Bytes that nothing here has written, or a net they cannot hold."""


class Alphabet(NamedTuple):
    """What is known of an array beforehand: symbols 0 to n_levels - 1; `zero` is the pruned one."""

    shape: tuple
    n_levels: int
    zero: int

    @property
    def size(self):
        """The number of symbols in the array."""
        return math.prod(self.shape)

    @property
    def is_told(self):
        """Whether there is anything to tell: an array, and more than one symbol."""
        return self.n_levels > 1 and self.size > 0


class ByteReader:
    """Takes bytes off the front; raises CompressionError if too few or too many are there."""

    def __init__(self, data, what):
        self.data, self.what, self.position = data, what, 0

    def take(self, n):
        """Return the next n bytes."""
        if n > len(self.data) - self.position:
            raise CompressionError(f"{self.what} must go on for {n} bytes after byte "
                                   f"{self.position}, got {len(self.data) - self.position}")
        self.position += n
        return self.data[self.position - n:self.position]

    def end(self):
        """Raise unless all bytes have been taken."""
        if self.position < len(self.data):
            raise CompressionError(f"{self.what} must end after byte {self.position}, "
                                   f"got {len(self.data)} bytes")


def encode(coder, arrays, alphabets):
    """Return `arrays` of integers, one for each of `alphabets`, as bytes; coder: in CODERS.

    Raises ValueError if it is not.
    """
    check(tuple(CODERS), coder=coder)
    told = [(np.asarray(array, np.int64).ravel(), a)
            for array, a in zip(arrays, alphabets, strict=True) if a.is_told]
    return CODERS[coder][0]([array for array, _ in told], [a for _, a in told])


def decode(coder, data, alphabets):
    """Return the list of int64 arrays that encode(coder, arrays, alphabets) made `data` from.

    Time and memory are bounded by the sizes in `alphabets`. Raises CompressionError if `data` is
    not exactly what encode writes for some arrays of these alphabets.
    """
    told, (encoder, decoder) = [a for a in alphabets if a.is_told], CODERS[coder]
    try:
        arrays = decoder(data, told)
    except ValueError as error:
        raise CompressionError(f"symbols cannot be decoded: {error}") from error
    if any(array.min() < 0 or array.max() >= a.n_levels for array, a in zip(arrays, told)):
        raise CompressionError("symbols cannot be decoded: one of them is not in its alphabet")
    # a decoder does not see all that is odd, such as bits that it never reads
    if encoder(arrays, told) != data:
        raise CompressionError("symbols cannot be decoded: the encoder writes other bytes for them")
    decoded = iter(arrays)
    return [(next(decoded) if a.is_told else np.zeros(a.size, np.int64)).reshape(a.shape)
            for a in alphabets]


def to_bits(values, width):
    """Return the last `width` bits of integers, the highest first: uint8 along a new last axis."""
    return (values[..., None] >> np.arange(width)[::-1] & 1).astype(np.uint8)


def from_bits(bits):
    """Return the integers that to_bits makes `bits` from, int64."""
    return bits @ (1 << np.arange(bits.shape[-1])[::-1])


def _width(alphabet):
    return (alphabet.n_levels - 1).bit_length()


def _encode_packed(arrays, alphabets):
    bits = [to_bits(array, _width(a)).ravel() for array, a in zip(arrays, alphabets)]
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *bits])).tobytes()


def _decode_packed(data, alphabets):
    bits = ByteReader(np.unpackbits(np.frombuffer(data, np.uint8)), "packed bits")
    return [from_bits(bits.take(a.size * _width(a)).reshape(a.size, _width(a))) for a in alphabets]


def _encode_context(arrays, alphabets):
    coder = RangeEncoder()
    model = ContextModel(coder)
    densities = [log_odds(np.count_nonzero(array != a.zero), a.size)
                 for array, a in zip(arrays, alphabets)]
    for array, a, density in zip(arrays, alphabets, densities):
        model.code(a, density, array)
    return np.array(densities, np.int8).tobytes() + coder.finish()


def _decode_context(data, alphabets):
    reader = ByteReader(data, "densities")
    densities = np.frombuffer(reader.take(len(alphabets)), np.int8).tolist()
    model = ContextModel(RangeDecoder(data[reader.position:]))
    return [model.code(a, density) for a, density in zip(alphabets, densities)]


CODERS = {"packed": (_encode_packed, _decode_packed),
          "context": (_encode_context, _decode_context)}
