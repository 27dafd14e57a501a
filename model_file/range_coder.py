"""Bits as bytes, hardly longer than their entropy: an interval of integers is narrowed bit by bit.

Its lower part, in proportion to how likely a one is, stands for a one, the upper part for a zero.
Any number of the last interval tells all bits. Source: Martin, "Range encoding: an algorithm for
removing redundancy from a digitised message", 1979.
"""

import numpy as np

ONE = 2**16  # probabilities are integers between 0 and this
NARROW, WIDE = 2**32, 2**48 - 1  # below NARROW the interval is widened by a word of 16 bits


class RangeEncoder:
    """Call it with `ones`, how likely a one is for each bit, and `bits`: integer arrays, (n,)."""

    def __init__(self):
        self.low, self.width, self.words = 0, WIDE, []

    def __call__(self, ones, bits):
        low, width = self.low, self.width
        for one, bit in zip(ones.tolist(), bits.tolist()):
            part = width // ONE * one
            if bit:
                width = part
            else:
                low, width = low + part, width - part
            while width < NARROW:
                self.words.append(low // NARROW)  # ONE or more: a carry into the word before
                low, width = low % NARROW * ONE, width * ONE
        self.low, self.width = low, width
        return bits.astype(np.int64)

    def finish(self):
        """Return the bytes; nothing can be encoded after that."""
        words, carry = [*self.words, -(-self.low // NARROW)], 0
        for i in reversed(range(len(words))):
            carry, words[i] = divmod(words[i] + carry, ONE)
        return np.array(words, ">u2").tobytes()


class RangeDecoder:
    """Call it with the same `ones`, in turn, for the bits, int64. Zeros follow the last byte."""

    def __init__(self, data):
        self.words = iter(np.frombuffer(data[6:], ">u2").tolist())
        # at: the number that tells the bits, less the lower end
        self.width, self.at = WIDE, int.from_bytes(data[:6].ljust(6, b"\0"), "big")

    def __call__(self, ones, _):
        bits, at, width = [], self.at, self.width
        for one in ones.tolist():
            part = width // ONE * one
            bits.append(at < part)
            if at < part:
                width = part
            else:
                at, width = at - part, width - part
            while width < NARROW:
                at, width = at * ONE + next(self.words, 0), width * ONE
        self.at, self.width = at, width
        return np.array(bits, np.int64)
