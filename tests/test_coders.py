"""Coders against Shannon's bound, closed forms, and bytes that nobody encoded."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from experiments.records import weights_path
from model_file import context_model
from model_file.coders import CODERS, Alphabet, ByteReader, CompressionError, decode, encode
from model_file.range_coder import ONE, RangeDecoder, RangeEncoder

quick = settings(max_examples=60)
names = st.sampled_from(sorted(CODERS))


@st.composite
def arrays_of_symbols(draw, max_levels=20):
    """1 to 3 arrays of 1 to 4 dimensions, some of them empty or of one symbol, and their alphabets.
    """
    arrays, alphabets = [], []
    for _ in range(draw(st.integers(1, 3))):
        n_levels = draw(st.integers(1, max_levels))
        shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
        highest = draw(st.integers(0, n_levels - 1))  # symbols above it do not occur
        arrays.append(draw(hnp.arrays(np.int64, shape, elements=st.integers(0, highest))))
        alphabets.append(Alphabet(shape, n_levels, draw(st.integers(0, n_levels - 1))))
    return arrays, alphabets


def skewed(seed, shape, n_levels, zero):
    """An array of independent symbols, most of them zero, and its alphabet."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(n_levels, 0.7))
    p[zero] += 2
    return rng.choice(n_levels, shape, p=p / p.sum()), Alphabet(shape, n_levels, zero)


@pytest.fixture(scope="module")
def ternary():
    """Signs, as symbols, of the 3x3 kernels in the residual stages of the shipped net that is 70 %
    pruned.
    """
    state = torch.load(weights_path("lab2e_global"), weights_only=True)
    weights = [
        w.numpy()
        for name, w in state.items()
        if name.startswith("body_op") and w.shape[2:] == (3, 3)
    ]
    return [np.sign(w).astype(np.int64) + 1 for w in weights], [
        Alphabet(w.shape, 3, 1) for w in weights
    ]


# ---------------------------------------------------------------- back and forth


@quick
@given(arrays_of_symbols())
def test_decoding_gives_the_symbols_back(case):
    arrays, alphabets = case
    for coder in CODERS:
        decoded = decode(coder, encode(coder, arrays, alphabets), alphabets)
        assert len(decoded) == len(arrays)
        assert all(np.array_equal(a, b) and a.shape == b.shape for a, b in zip(arrays, decoded))


def by_rule(shape, n_levels, zero, zeros):
    """Symbols by a rule that no library changes, about `zeros` of 11 zero; and their alphabet."""
    i = np.arange(math.prod(shape))
    array = np.where(i * 7919 % 11 < zeros, zero, (i * i // 5 + 3 * i) % n_levels)
    return array.reshape(shape), Alphabet(shape, n_levels, zero)


def test_bytes_of_many_levels_do_not_change():
    """What was written once must be read by every later version."""
    cases = [((4, 4, 3, 3), 16, 7, 5), ((4, 4, 3, 3), 16, 7, 2), ((3, 5, 1, 1), 17, 0, 4),
             ((6, 50), 257, 256, 3), ((8, 9, 3, 3), 5, 2, 11)]
    arrays, alphabets = map(list, zip(*(by_rule(*case) for case in cases)))
    arrays.append(np.full((8, 9, 3, 3), 3))  # and no zero at all
    alphabets.append(Alphabet((8, 9, 3, 3), 5, 2))
    data = encode("context", arrays, alphabets)
    assert (len(data), zlib.crc32(data)) == (446, 0x8c767026)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("n_levels", [2, 3, 4, 5, 16, 17, 256, 257])
def test_all_levels_of_an_alphabet(coder, n_levels):
    array = np.random.default_rng(0).permutation(np.arange(n_levels).repeat(9))
    array = array.reshape(n_levels, 1, 3, 3)
    for zero in {0, 1, n_levels // 3, n_levels - 2, n_levels - 1}:
        alphabets = [Alphabet(array.shape, n_levels, zero)]
        assert np.array_equal(decode(coder, encode(coder, [array], alphabets), alphabets)[0], array)


@pytest.mark.parametrize("coder", CODERS)
def test_real_weights(coder, ternary):
    decoded = decode(coder, encode(coder, *ternary), ternary[1])
    assert all(np.array_equal(a, b) for a, b in zip(ternary[0], decoded))


# If these change, old files are unreadable: raise the format's version.
@pytest.mark.parametrize("coder, data", [
    ("packed", "1595155a581268"), ("context", "eb0040f3a415cf59"),
])
def test_bytes_are_those_of_the_first_version(coder, data):
    ternary = np.array([0, 1, 1, 1, 2, 1, 1, 1, 0, 1, 1, 1, 1, 1, 2, 2, 1, 1]).reshape(2, 1, 3, 3)
    five = np.array([4, 0, 2, 2, 3, 2])
    alphabets = [Alphabet((2, 1, 3, 3), 3, 1), Alphabet((6,), 5, 2)]
    assert encode(coder, [ternary, five], alphabets).hex() == data
    assert [a.tolist() for a in decode(coder, bytes.fromhex(data), alphabets)] == [
        ternary.tolist(),
        five.tolist(),
    ]


# ---------------------------------------------------------------- lengths


@quick
@given(arrays_of_symbols())
def test_a_fixed_width_is_as_long_as_counted(case):
    bits = sum(array.size * math.ceil(math.log2(a.n_levels)) for array, a in zip(*case))
    assert len(encode("packed", *case)) == math.ceil(bits / 8)


def bound(arrays):
    """Their entropy in bytes: what no coder that knows the histograms alone can go below."""
    return sum(entropy(np.bincount(a.ravel()), base=2) * a.size / 8 for a in arrays)


# ---------------------------------------------------------------- the context model


def test_contexts_pay_on_real_weights(ternary):
    """Below the bound that holds for coders that know histograms only."""
    assert len(encode("context", *ternary)) < 0.92 * bound(ternary[0])


def test_contexts_of_shuffled_weights_pay_nothing(ternary):
    """Where there is no structure, none can be found; and looking for it costs little."""
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(array.ravel()).reshape(array.shape) for array in ternary[0]]
    assert 1 <= len(encode("context", shuffled, ternary[1])) / bound(shuffled) < 1.02


@pytest.mark.parametrize("n_levels, zero", [(2, 0), (2, 1), (3, 0), (3, 1), (16, 8), (17, 5)])
def test_contexts_of_independent_symbols_cost_little(n_levels, zero):
    """The first array has to be learned from; after it, four more cost hardly more than their
    entropy.
    """
    arrays, alphabets = zip(*(skewed(1, (64, 64, 3, 3), n_levels, zero) for _ in range(5)))
    first, all_of_them = (len(encode("context", arrays[:n], alphabets[:n])) for n in (1, 5))
    assert first < 1.07 * bound(arrays[:1])
    assert all_of_them - first < 1.01 * bound(arrays[1:])


@given(st.integers(1, 2**47))
def test_logarithm_is_exact(x):
    v = int(context_model._log(x))
    assert 2**v <= x**16 < 2 ** (v + 1)


@given(st.integers(-256, 400))
def test_power_is_exact(v):
    x = context_model._exp(v)
    assert x**16 <= 2 ** (v + 256) < (x + 1) ** 16


def test_probabilities_are_whole_numbers_between_never_and_always(ternary):
    def check(ones, bits):
        assert ones.dtype == np.int64 and (ones >= 1).all() and (ones < ONE).all()
        return bits.astype(np.int64)

    model = context_model.ContextModel(check)
    for array, alphabet in zip(*ternary):
        model.code(alphabet, context_model.log_odds(int((array != 1).sum()), array.size), array)


# ---------------------------------------------------------------- the range coder

bits_with_chances = st.lists(st.tuples(st.one_of(st.integers(1, ONE - 1), st.sampled_from(
    [1, 2, ONE // 2, ONE - 1])), st.booleans()), max_size=300)


# After two bits the interval is just as narrow as it may be.
AS_NARROW_AS_CAN_BE = [(ONE - 2, False), (ONE // 2, True),
                       *((12345 + 77 * i, i % 3 == 0) for i in range(40))]


def coded(ones, bits):
    encoder = RangeEncoder()
    encoder(np.array(ones, np.int64), np.array(bits, np.int64))
    return encoder.finish()


@given(bits_with_chances)
@example(AS_NARROW_AS_CAN_BE)
@example(AS_NARROW_AS_CAN_BE[:2])
def test_a_range_coder_s_bytes_are_a_number_of_the_last_interval(case):
    """In integers that grow without bound, where nothing is carried."""
    low, width, n_words = 0, 2**48 - 1, 1
    for one, bit in case:
        part = width // ONE * one
        low, width = (low, part) if bit else (low + part, width - part)
        while width < 2**32:
            low, width, n_words = low * ONE, width * ONE, n_words + 1
    words = np.frombuffer(coded(*zip(*case)) if case else coded([], []), ">u2").tolist()
    number = sum(word * ONE**i for i, word in enumerate(reversed(words)))
    assert len(words) == n_words and low <= number * 2**32 < low + width


@given(bits_with_chances)
@example(AS_NARROW_AS_CAN_BE)
@example(AS_NARROW_AS_CAN_BE[:2])
def test_a_range_coder_gives_the_bits_back_in_little_more_than_their_entropy(case):
    ones, bits = zip(*case) if case else ((), ())
    data = coded(ones, bits)
    assert RangeDecoder(data)(np.array(ones, np.int64), None).tolist() == list(map(int, bits))
    needed = sum(-math.log2((one if bit else ONE - one) / ONE) for one, bit in case)
    assert len(data) <= needed / 8 * 1.0001 + 4


def test_a_range_decoder_reads_zeros_where_there_is_nothing():
    assert RangeDecoder(b"")(np.ones(100, np.int64), None).all()  # zero is below any part


@pytest.mark.parametrize("counts, one", [
    ([2**40, 1], 1), ([1, 2**40], ONE - 1), ([3, 1], ONE // 4),
])
def test_no_bit_is_taken_for_impossible(counts, one):
    contexts, asked = context_model._Contexts([0]), []
    contexts.counts[0] = counts
    contexts.code(lambda ones, bits: asked.append(ones) or bits, np.zeros(1, np.int64), np.ones(1))
    assert [ones.tolist() for ones in asked] == [[one]]


def test_a_carry_goes_back_over_several_words():
    rng, longest = np.random.default_rng(0), 0
    for _ in range(200):
        ones = np.where(rng.random(400) < 0.5, 1, ONE - 1)
        bits = (ones == ONE - 1) ^ (rng.random(400) < 0.01)
        encoder, carry, far = RangeEncoder(), 0, 0
        encoder(ones, bits)
        for word in reversed(encoder.words):
            carry = (word + carry) // ONE
            far = far + 1 if carry else 0
            longest = max(longest, far)
        assert (RangeDecoder(encoder.finish())(ones, None) == bits).all()
    assert longest > 3


# ---------------------------------------------------------------- bytes that nobody encoded


def decodes_or_refuses(coder, data, alphabets):
    try:
        arrays = decode(coder, data, alphabets)
    except CompressionError:
        return False
    for array, a in zip(arrays, alphabets, strict=True):
        assert array.shape == a.shape
        assert array.size == 0 or 0 <= array.min() and array.max() < a.n_levels
    assert encode(coder, arrays, alphabets) == data
    return True


@quick
@given(st.binary(max_size=80), arrays_of_symbols(), names)
def test_any_bytes_are_decoded_or_refused(data, case, coder):
    decodes_or_refuses(coder, data, case[1])


@pytest.mark.parametrize("coder", CODERS)
def test_altered_bytes_are_decoded_or_refused(coder):
    array, alphabet = skewed(0, (8, 4, 3, 3), 5, 2)
    data, rng = encode(coder, [array], [alphabet]), np.random.default_rng(0)
    for _ in range(150):
        altered = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            altered[position] = rng.integers(0, 256)
        decodes_or_refuses(coder, bytes(altered), [alphabet])
    for n in range(len(data)):
        assert not decodes_or_refuses(coder, data[:n], [alphabet])


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("more", [b"\0", b"\0\0\0\0", b"\xff" * 8])
def test_bytes_too_many_are_refused(coder, more):
    array, alphabet = skewed(0, (8, 4, 3, 3), 5, 2)
    with pytest.raises(CompressionError):
        decode(coder, encode(coder, [array], [alphabet]) + more, [alphabet])
    with pytest.raises(CompressionError):
        decode(coder, more, [Alphabet((3,), 1, 0)])


@pytest.mark.parametrize("zero, symbol", [(1, -1), (14, 16)])
def test_a_symbol_that_is_not_in_the_alphabet_is_refused(zero, symbol):
    """The context coder tells distances from zero, so that its bytes can say more on one side."""
    alphabet = Alphabet((4, 5), 16, zero)
    array = np.tile([zero, symbol, zero, 3], 5)
    data = CODERS["context"][0]([array], [alphabet])
    assert CODERS["context"][1](data, [alphabet])[0].tolist() == array.tolist()
    with pytest.raises(CompressionError, match="not in its alphabet"):
        decode("context", data, [alphabet])


def test_as_many_arrays_as_alphabets():
    array, alphabet = skewed(0, (8,), 5, 2)
    for case in (([array], [alphabet] * 2), ([array] * 2, [alphabet])):
        with pytest.raises(ValueError, match="zip"):
            encode("packed", *case)


def test_a_reader_takes_what_is_there_and_says_what_is_not():
    reader = ByteReader(bytes(range(10)), "the data")
    assert reader.take(3) == bytes([0, 1, 2]) and reader.take(0) == b"" and reader.position == 3
    with pytest.raises(CompressionError) as caught:
        reader.take(8)
    assert str(caught.value) == "the data must go on for 8 bytes after byte 3, got 7"
    with pytest.raises(CompressionError) as caught:
        reader.end()
    assert str(caught.value) == "the data must end after byte 3, got 10 bytes"
    assert reader.take(7) == bytes(range(3, 10))
    reader.end()
