"""Arrays of small integers as bytes, and back."""

import math
from typing import NamedTuple

import numpy as np
from constriction import stream, symbol

from model_file.context_model import ContextModel, log_odds

MAX_LEVELS = 257  # 8 bits and, beside their grid, the pruned zero


class CompressionError(ValueError):
    """Bytes that nothing here has written, or a net that they cannot hold."""


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


def encode(coder, arrays, alphabets):
    """Return `arrays` of integers, one for each of `alphabets`, as bytes. coder: a key of CODERS.
    """
    told = [(np.asarray(array, np.int64).ravel(), a)
            for array, a in zip(arrays, alphabets, strict=True)
            if a.is_told]
    return CODERS[coder][0]([array for array, _ in told], [a for _, a in told])


def decode(coder, data, alphabets):
    """Return the list of int64 arrays that encode(coder, arrays, alphabets) made `data` from.

    Time and memory are bounded by the sizes in `alphabets`, whatever `data` holds. Raises
    CompressionError if `data` is not exactly what encode writes for some arrays of these alphabets.
    """
    told = [a for a in alphabets if a.is_told]
    try:
        arrays = CODERS[coder][1](data, told)
    # constriction raises both for words that it cannot have written
    except (ValueError, AssertionError) as error:
        raise CompressionError(f"symbols cannot be decoded: {error}") from error
    if any(array.min() < 0 or array.max() >= a.n_levels for array, a in zip(arrays, told)):
        raise CompressionError("symbols cannot be decoded: one of them is not in its alphabet")
    # A decoder does not see all that is odd, such as bits it never reads. Comparing is the whole
    # check.
    if CODERS[coder][0](arrays, told) != data:
        raise CompressionError("symbols cannot be decoded: the encoder writes other bytes for them")
    decoded = iter(arrays)
    return [(next(decoded) if a.is_told else np.zeros(a.size, np.int64)).reshape(a.shape)
            for a in alphabets]


def entropy_bytes(arrays, alphabets):
    """Return the empirical entropy of the arrays, in bytes, by the histogram of each.

    No coder that goes by the histograms alone can be shorter; one that looks at neighbours can.
    Source: Shannon, "A Mathematical Theory of Communication", 1948, theorem 9.
    """
    bits = 0.0
    for array, a in zip(arrays, alphabets, strict=True):
        counts = _histogram(np.asarray(array).ravel(), a)
        counts = counts[counts > 0]
        bits += float((counts * np.log2(counts.sum() / counts)).sum())
    return bits / 8


def _histogram(array, alphabet):
    return np.bincount(array, minlength=alphabet.n_levels)


# ---------------------------------------------------------------- bytes and bits


class ByteReader:
    """Takes bytes off the front; raises CompressionError if too few or too many are there."""

    def __init__(self, data, what):
        self.data, self.what, self.position = data, what, 0

    def take(self, n):
        """Return the next n bytes."""
        if n > len(self.data) - self.position:
            raise CompressionError(
                f"{self.what} must go on for {n} bytes after byte {self.position}, "
                f"got {len(self.data) - self.position}"
            )
        self.position += n
        return self.data[self.position - n:self.position]

    def end(self):
        """Raise unless all bytes have been taken."""
        if self.position < len(self.data):
            raise CompressionError(
                f"{self.what} must end after byte {self.position}, got {len(self.data)} bytes"
            )


def to_bits(values, width):
    """Return non-negative integers as an array of bits, `width` bits each, the highest bit first.
    """
    return ((np.asarray(values, np.int64).reshape(-1, 1) >> np.arange(width)[::-1] & 1)
            .astype(np.uint8)
            .ravel())


def _from_bits(bits, width):
    return (bits.reshape(-1, width) @ (1 << np.arange(width, dtype=np.int64)[::-1])
            if width
            else np.zeros(0, np.int64))


def pack(chunks):
    """Return a list of arrays of bits as bytes, the last one filled up with zeros."""
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *chunks])).tobytes()


def bit_reader(data):
    """Return read(count, width), which gives the next `count` integers of `width` bits in `data`.
    """
    # a bit in each byte
    rest = ByteReader(np.unpackbits(np.frombuffer(data, np.uint8)), "packed symbols")

    def read(count, width):
        return _from_bits(rest.take(count * width), width) if width else np.zeros(count, np.int64)

    return read


def _to_words(words):
    return words.astype("<u4").tobytes()


def _from_words(data):
    return np.frombuffer(data, "<u4").astype(np.uint32)  # ValueError unless these are whole words


# ---------------------------------------------------------------- fixed width


def _encode_packed(arrays, alphabets):
    return pack(
        [to_bits(array, (a.n_levels - 1).bit_length()) for array, a in zip(arrays, alphabets)]
    )


def _decode_packed(data, alphabets):
    read = bit_reader(data)
    return [read(a.size, (a.n_levels - 1).bit_length()) for a in alphabets]


def _encode_bitmask(arrays, alphabets):
    chunks = []
    for array, a in zip(arrays, alphabets):
        kept = array[array != a.zero]
        chunks += [to_bits(array != a.zero, 1),
                   to_bits(kept - (kept > a.zero), (a.n_levels - 2).bit_length())]
    return pack(chunks)


def _decode_bitmask(data, alphabets):
    read, arrays = bit_reader(data), []
    for a in alphabets:
        array = np.full(a.size, a.zero, np.int64)
        mask = read(a.size, 1) == 1
        kept = read(int(mask.sum()), (a.n_levels - 2).bit_length())
        array[mask] = kept + (kept >= a.zero)
        arrays.append(array)
    return arrays


# ---------------------------------------------------------------- by histogram: Huffman and range
# coding


def _encode_counts(arrays, alphabets):
    """Return the histograms as bytes; the last count of each follows from the array's size."""
    return pack([
                    to_bits(_histogram(array, a)[:-1], a.size.bit_length())
                    for array, a in zip(arrays, alphabets)
                ])


def _decode_counts(data, alphabets):
    """Return (histograms, the words that follow them)."""
    reader = ByteReader(data, "histograms")
    read = bit_reader(
        reader.take(-(-sum((a.n_levels - 1) * a.size.bit_length() for a in alphabets) // 8))
    )
    histograms = []
    for a in alphabets:
        counts = read(a.n_levels - 1, a.size.bit_length())
        if counts.sum() > a.size:
            raise CompressionError(
                f"a histogram must add up to {a.size} symbols, got {counts.sum()}"
            )
        histograms.append(np.append(counts, a.size - counts.sum()))
    return histograms, _from_words(data[reader.position:])


def _encode_huffman(arrays, alphabets):
    queue = symbol.QueueEncoder()
    for array, a in zip(arrays, alphabets):
        # whole numbers: exact
        tree = symbol.huffman.EncoderHuffmanTree(_histogram(array, a).astype(np.float64))
        for s in array.tolist():
            queue.encode_symbol(s, tree)
    return _encode_counts(arrays, alphabets) + _to_words(queue.get_compressed_and_bitrate()[0])


def _decode_huffman(data, alphabets):
    histograms, words = _decode_counts(data, alphabets)
    queue, arrays = symbol.QueueDecoder(words), []
    for a, counts in zip(alphabets, histograms):
        tree = symbol.huffman.DecoderHuffmanTree(counts.astype(np.float64))
        arrays.append(np.array([queue.decode_symbol(tree) for _ in range(a.size)]))
    return arrays


def _model(counts):
    """Return the range coder's model of a histogram: positive integers that add up to 2^16.

    With such weights the library's own scaling, to 24 bits, is exact in float64 and so the same on
    any machine.
    """
    weights = 1 + counts * (2**16 - len(counts)) // counts.sum()
    weights[np.argmax(weights)] += 2**16 - weights.sum()
    return stream.model.Categorical(weights.astype(np.float64), perfect=False)


def _encode_range(arrays, alphabets):
    coder = stream.queue.RangeEncoder()
    for array, a in zip(arrays, alphabets):
        coder.encode(array.astype(np.int32), _model(_histogram(array, a)))
    return _encode_counts(arrays, alphabets) + _to_words(coder.get_compressed())


def _decode_range(data, alphabets):
    histograms, words = _decode_counts(data, alphabets)
    coder = stream.queue.RangeDecoder(words)
    return [coder.decode(_model(counts), a.size).astype(np.int64)
            for a, counts in zip(alphabets, histograms)]


# ---------------------------------------------------------------- by context


def _encode_context(arrays, alphabets):
    coder, family = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False)

    def put(weights, bits):
        coder.encode(bits.astype(np.int32), family, weights.astype(np.float64))
        return bits.astype(np.int64)

    model = ContextModel(put)
    densities = [
        log_odds(int((array != a.zero).sum()), a.size) for array, a in zip(arrays, alphabets)
    ]
    for array, a, density in zip(arrays, alphabets, densities):
        model.code(a, density, array)
    return np.array(densities, np.int8).tobytes() + _to_words(coder.get_compressed())


def _decode_context(data, alphabets):
    reader = ByteReader(data, "densities")
    densities = np.frombuffer(reader.take(len(alphabets)), np.int8).tolist()
    coder = stream.queue.RangeDecoder(_from_words(data[reader.position:]))
    family = stream.model.Categorical(perfect=False)
    model = ContextModel(
        lambda weights, _: coder.decode(family, weights.astype(np.float64)).astype(np.int64)
    )
    return [model.code(a, density) for a, density in zip(alphabets, densities)]


CODERS = {  # name: (encoder, decoder)
    "packed": (_encode_packed, _decode_packed),
    "bitmask": (_encode_bitmask, _decode_bitmask),
    "huffman": (_encode_huffman, _decode_huffman),
    "range": (_encode_range, _decode_range),
    "context": (_encode_context, _decode_context),
}
