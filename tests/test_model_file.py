"""Files of nets: the same logits to the last bit, bytes that add up, and no way to harm the reader.
"""

import copy
import functools
import math
import pickle
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conftest import same, state_of
from experiments.records import SHIPPED, weights_path
from experiments.run import load_checkpoint
from FP_layers import FP_Conv, FP_Linear, Learned, MinMax
from model_file import container, network
from model_file import __main__ as command_line
from model_file.__main__ import main
from model_file.coders import ByteReader
from model_file.container import Part, Record
from model_file.network import (
    CompressionError, _codes, _part, compress, decompress, describe, stored_shapes,
)
from resnet20 import ResNetCIFAR
from training.batches import normalize
from training.checkpoints import fit_quantizers, load_weights, save_weights

CONV = "body_op.0.conv1.0.conv.weight"

# checkpoint, Nbits, symmetric, quantizer; what the body's weights are in the file
CASES = [
    ("pretrain", None, False, "minmax"),  # floats
    ("lab2e_global", None, False, "minmax"),  # a mask
    ("lab2e_global", 2, True, "minmax"),  # levels, sparse
    ("lab3c_4bit", 4, False, "minmax"),  # levels, dense
    ("lab2e_global", 2, True, "learned"),  # steps, sparse
    ("lab3c_4bit", 4, False, "learned"),  # steps, dense
]


def shipped_net(name, Nbits=None, symmetric=False, quantizer="minmax"):
    """The shipped float weights of a run behind any quantizer; a learned step is the one it would
    start from.
    """
    net = load_weights(ResNetCIFAR(), weights_path(name))
    kind = {"minmax": MinMax, "learned": Learned}[quantizer]
    quantized = ResNetCIFAR(Nbits=Nbits, symmetric=symmetric, quantizer=kind)
    quantized.load_state_dict(net.state_dict(), strict=False)
    fit_quantizers(quantized)
    return quantized.eval()


def lively_net(num_layers=8, seed=0, **quantizer):
    """A small net with random weights, half of them zero, and BatchNorms that are not their
    defaults.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ResNetCIFAR(num_layers, **quantizer)
        for name, tensor in net.state_dict().items():
            if name.endswith("conv.weight"):
                tensor.mul_(torch.rand_like(tensor) > 0.5)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def ternary():
    return shipped_net("lab2e_global", 2, True, "learned")


@pytest.fixture(scope="module")
def four_bits():
    return shipped_net("lab3c_4bit", 4)


@pytest.fixture(scope="module")
def images(cifar):
    return normalize(cifar.test_images[:100])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def quantized_weights(net):
    return {
        name: m.quantized_weight()
        for name, m in net.named_modules()
        if isinstance(m, (FP_Conv, FP_Linear))
    }


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_of_shipped_nets_are_the_same_bits(case, images):
    net = shipped_net(*case)
    restored = decompress(compress(net))
    assert not restored.training and restored.Nbits is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(quantized_weights(net).values(), quantized_weights(restored).values())
    )
    assert torch.equal(restored(images[:20]), net(images[:20]))


@pytest.mark.parametrize("coder", ["none", "packed"])
def test_logits_are_the_same_bits_with_every_other_coder(coder, four_bits, ternary, images):
    for net in (four_bits, ternary):
        assert torch.equal(decompress(compress(net, coder))(images[:20]), net(images[:20]))


@pytest.mark.parametrize("num_layers, quantizer", [
    (8, {}), (14, {"Nbits": 1}), (8, {"Nbits": 0}), (8, {"Nbits": 8}), (8, {"Nbits": 16}),
    (8, {"Nbits": 8, "quantizer": Learned}), (8, {"Nbits": 5, "symmetric": True}),
    (8, {"Nbits": 10, "quantizer": Learned}),
])
def test_other_depths_and_widths(num_layers, quantizer, images):
    net = lively_net(num_layers, **quantizer)
    assert torch.equal(decompress(compress(net))(images[:10]), net(images[:10]))
    decompress(compress(net, "packed", 16))  # steps that do not fold


@pytest.mark.parametrize("low, fits", [(-256, True), (-257, False)])
def test_codes_are_taken_as_symbols_up_to_the_largest_alphabet(low, fits):
    value = np.array([[low, 0]], np.float32)
    assert (_codes(value, np.ones(1, np.float32)) is not None) == fits


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_learned_layer_of_one_sign(sign, images):
    net = lively_net(Nbits=3, quantizer=Learned)
    layer = net.body_op[0].conv2[0]
    layer.conv.weight.fill_(0.1 * sign)
    layer.fit_quantizer()
    assert torch.equal(decompress(compress(net))(images[:10]), net(images[:10]))


@pytest.mark.parametrize("n_levels, zeros, bits, kind", [
    (8, 8, 32, "levels"), (9, 2, 32, "float"), (9, 3, 32, "masked"), (9, 8, 8, "float"),
    (9, 9, 8, "masked"),
])
def test_what_a_tensor_is_told_as(n_levels, zeros, bits, kind):
    value = np.zeros(64, np.float32)
    value[zeros:] = np.resize(np.arange(1, n_levels), 64 - zeros)
    assert _part("a.weight", value.reshape(8, 8), None, "packed", bits).record.kind == kind


def test_the_zero_of_levels_is_the_one_nearest_to_it():
    value = np.resize(np.float32([-2, -0.5, 1]), (8, 8))
    assert _part("a.weight", value, None, "packed", 32).record.zero == 1


def test_odd_tensors(images):
    """All zeros, one value, one non-zero, negative scales, a step that no weight reaches."""
    net = lively_net(Nbits=3)
    net.body_op[0].conv1[0].conv.weight.zero_()
    net.body_op[0].conv2[0].conv.weight.fill_(-0.25)
    net.body_op[1].conv1[0].conv.weight.zero_()[3, 2, 1, 1] = 1
    net.body_op[1].conv1[1].weight.neg_()
    net.head_conv[0].conv.weight.zero_()
    net.final_fc.linear.weight.fill_(-0.0)
    net.head_conv[1].eps = 0.1
    for coder in container.CODERS:
        assert torch.equal(decompress(compress(net, coder))(images[:10]), net(images[:10]))
    learned = lively_net(Nbits=3, quantizer=Learned)
    for module in learned.body_op.modules():
        if isinstance(module, FP_Conv):
            module.quantizer.step[0] = 1e9
            module.quantizer.step[1] *= -1
    assert torch.equal(decompress(compress(learned))(images[:10]), learned(images[:10]))


def test_a_file_is_the_same_when_packed_again(four_bits):
    """decompress gives exactly what the file holds: its net makes the same file, quantizers or not.
    """
    data = compress(four_bits)
    assert compress(decompress(data)) == data


def test_the_net_is_left_alone(ternary):
    net = copy.deepcopy(ternary).train()
    before = state_of(net)
    compress(net, float_bits=7)
    assert all(module.training for module in net.modules()) and same(net.state_dict(), before)
    assert compress(net.double()) == compress(ternary)


# ---------------------------------------------------------------- fewer bits for floats


@pytest.mark.slow
@pytest.mark.parametrize("float_bits, tolerance", [(16, 0.05), (7, 0.7)])
def test_rounded_floats_change_logits_little(float_bits, tolerance, four_bits, ternary, images):
    for net in (four_bits, ternary):
        restored = decompress(compress(net, "packed", float_bits))
        assert 0 < (restored(images[:20]) - net(images[:20])).abs().max() < tolerance


@pytest.mark.parametrize("quantizer", [dict(), dict(Nbits=4, quantizer=Learned)], ids=str)
def test_a_channel_without_weights_does_not_coarsen_the_others(quantizer, images):
    """Its variance has vanished, so that its scale is a hundred times the others'."""
    net = lively_net(**quantizer).eval()
    conv, norm = net.body_op[0].conv1[:2]
    conv.conv.weight.data[3] = 0
    norm.running_var[3] = 0
    decoded = decompress(compress(net, float_bits=7))
    assert 0 < (decoded(images) - net(images)).abs().max() < 0.7
    weight = decoded.body_op[0].conv1[1].weight
    assert weight[3] == 0 and weight.abs().max() < 10


def test_folded_steps_leave_whole_numbers(ternary):
    restored = decompress(compress(ternary, float_bits=16))
    for block in restored.body_op:
        assert set(block.conv1[0].conv.weight.unique().tolist()) == {-1, 0, 1}


def answers_of(net, x):
    return torch.cat([net(part).argmax(1) for part in x.split(50)])


@pytest.mark.slow
def test_accuracy_with_floats_of_7_bits(four_bits, cifar):
    """Within half a point on 1,000 real images, and nearly always the same answer."""
    x, y = normalize(cifar.test_images[:1000]), cifar.test_labels[:1000]
    answers = [answers_of(net, x)
               for net in (four_bits, decompress(compress(four_bits, "packed", 7)))]
    exact, rounded = ((answer == y).float().mean().item() for answer in answers)
    assert abs(exact - rounded) <= 0.005
    assert (answers[0] == answers[1]).float().mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lab3d_2bit_improved"])
def test_a_shipped_file_holds_its_run(name, cifar):
    """With floats of 7 bits: its zeros are the run's, and on 200 real images it nearly always
    answers the same.
    """
    shipped = decompress((SHIPPED / f"{name}.rnpq").read_bytes())
    net, x = load_checkpoint(name).eval(), normalize(cifar.test_images[:200])
    zeros = [
        [weight == 0 for layer, weight in quantized_weights(n).items() if "body" in layer]
        for n in (net, shipped)
    ]
    assert all(torch.equal(*pair) for pair in zip(*zeros))
    assert (answers_of(net, x) == answers_of(shipped, x)).float().mean() > 0.98


def test_the_shipped_file_is_decoded_in_less_than_a_second():
    data, seconds = (SHIPPED / "lab3d_2bit_improved.rnpq").read_bytes(), []
    for _ in range(3):
        started = time.process_time()
        decompress(data)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1


finite_rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6),
    elements=st.floats(-1000, 1000, width=32),
)


@given(finite_rows, st.sampled_from(container.FLOAT_BITS))
def test_floats_are_near(values, bits):
    data = container.encode_floats(values, bits)
    reader = ByteReader(data, "floats")
    read = container.decode_floats(reader, values.shape, bits)
    reader.end()
    if bits == 32:
        assert np.array_equal(read, values)
    elif bits == 16:
        assert np.array_equal(read, values.astype(np.float16).astype(np.float32))
    elif values.size:
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        ulp = np.spacing(np.maximum(abs(low), abs(high)).astype(np.float16)).astype(np.float32)
        half_a_step = (high - low + ulp) / (2**bits - 1) * 1.001 / 2 + 2e-7
        assert (abs(read - values) <= half_a_step + 1e-6 * abs(values)).all()
        rows, columns = values.shape
        assert len(data) == rows * (4 + math.ceil(columns * bits / 8))


# ---------------------------------------------------------------- sizes


@pytest.mark.slow
def test_sizes_are_in_order(ternary, four_bits):
    for net in (ternary, four_bits):
        float32, float16, *others = sizes = [
            len(compress(net, coder, bits)) for coder, bits in (
                ("none", 32), ("none", 16), ("packed", 32), ("context", 32), ("context", 16),
                ("context", 7))]
        assert 4 * 272_474 < float32 < 4 * 272_474 + 400
        assert 2 * 272_474 < float16 < 2 * 272_474 + 400
        assert sorted(sizes, reverse=True) == sizes


@pytest.mark.parametrize("coder", container.CODERS)
def test_every_byte_is_accounted_for(coder, ternary):
    data = compress(ternary, coder, 16)
    sections, rows = describe(data)
    assert sum(sections.values()) == len(data)
    assert (
        sum(row[2] for row in rows) == sections["floats"]
        and sum(row[3] for row in rows) == sections["symbols"]
    )
    assert sum(math.prod(record.shape) for record, *_ in rows) == 272_474
    zeros = {
        name: (weight == 0).float().mean().item()
        for name, weight in quantized_weights(ternary).items()
    }
    assert all(
        fraction == pytest.approx(zeros[record.name.rsplit(".", 2)[0]])
        for record, fraction, *_ in rows
        if record.name.endswith("conv.weight")
    )


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "argument, value",
    [
        ("coder", "zip"),
        ("coder", None),
        ("float_bits", 33),
        ("float_bits", True),
        ("float_bits", "16"),
        ("float_bits", 0),
    ],
)
def test_arguments_out_of_range_are_named(argument, value):
    allowed = {"coder": "'none', 'packed' or 'context'",
               "float_bits": "32, 16 or 7"}[argument]
    with pytest.raises(ValueError) as caught:
        compress(lively_net(), **{argument: value})
    assert str(caught.value) == f"{argument} must be {allowed}, got {value!r}"


def test_only_this_family_of_nets():
    with pytest.raises(TypeError, match="net must be a ResNetCIFAR, got Linear"):
        compress(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_layers must be 8, 14, .* 104 or 110, got 116"):
        compress(ResNetCIFAR(116))
    with pytest.raises(ValueError, match="net must have a width of 16 channels .*, got 32"):
        compress(ResNetCIFAR(width=32))


@pytest.mark.parametrize("name, value", [
    ("final_fc.linear.bias", math.nan), (CONV, math.inf), ("body_op.1.conv2.1.running_var", -1.0),
])
def test_a_net_that_is_not_finite_is_refused(name, value):
    net = lively_net(Nbits=4)
    net.state_dict()[name].fill_(value)
    with pytest.raises(CompressionError, match="net must be finite"):
        compress(net)


def test_values_beyond_float16_are_refused():
    net = lively_net()
    net.final_fc.linear.bias.fill_(1e6)
    assert torch.equal(decompress(compress(net)).final_fc.linear.bias, net.final_fc.linear.bias)
    for float_bits in (16, 7):
        with pytest.raises(CompressionError, match="values must be at most 65504.* got 1000000"):
            compress(net, float_bits=float_bits)


# ---------------------------------------------------------------- the layout, byte by byte


def parts_of_all_kinds(bits):
    """[Part] and, as the format's description has them, the table, the floats and the symbols.

    bits: 32, 16 or 7; with 7, rows lie on a grid from end to end. Symbols are packed.
    """
    def packed(text):
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")

    def row(low, step, codes):
        values = [low + step * code for code in codes]
        coded = packed("".join(f"{code:07b}" for code in codes))
        return values, struct.pack("<ee", low, step) + coded

    rows = [row(-1.0, 0.25, [0, 127, 5]), row(2.0, 0.5, [127, 1, 0])]
    alone, kept = row(-0.5, 0.125, [3, 0, 127, 2, 1]), row(-3.0, 0.5, [127, 0, 9])
    code = "f" if bits == 32 else "e"

    def told(*rows):
        if bits == 7:
            return b"".join(coded for _, coded in rows)
        values = [value for row, _ in rows for value in row]
        return struct.pack(f"<{len(values)}{code}", *values)

    def array(values, shape=-1):
        return np.array(values, np.float32).reshape(shape)

    def symbols(values, shape):
        return np.array(values, np.int64).reshape(shape)

    levels, steps = [-0.5, 0.0, 0.75], [0.5, 2.0]
    parts = [
        Part(Record("a.weight", (2, 3), "float"), array([row for row, _ in rows], (2, 3)), None),
        Part(Record("norm", (5,), "float"), array(alone[0]), None),
        Part(Record("b.weight", (4, 2), "masked", 2, 0), array(kept[0]),
             symbols([0, 1, 0, 0, 1, 0, 1, 0], (4, 2))),
        Part(Record("c.weight", (3, 1, 2, 1), "levels", 3, 1), array(levels),
             symbols([0, 1, 1, 2, 1, 0], (3, 1, 2, 1))),
        Part(Record("d.weight", (2, 3), "steps", 5, 2), array(steps),
             symbols([2, 0, 4, 3, 2, 2], (2, 3))),
        Part(Record("e.weight", (2, 2), "codes", 3, 1), array([]), symbols([0, 1, 2, 1], (2, 2))),
    ]
    table = bytes([0, 0, 1, 2, 0, 0, 0, 2, 3, 0, 1, 0, 3, 5, 0, 2, 0, 4, 3, 0, 1, 0])
    few = struct.pack(f"<5{code}", *levels, *steps)  # with 16 bits even where others have fewer
    floats = told(*rows) + told(alone) + told(kept) + few
    coded = packed("01001010" + "000101100100" + "010000100011010010" + "00011001")
    return parts, table, floats, coded


@pytest.mark.parametrize("bits", container.FLOAT_BITS)
def test_every_byte_is_where_the_format_has_it(bits):
    parts, table, floats, symbols = parts_of_all_kinds(bits)
    data = container.write(14, "packed", bits, parts)
    magic, version, crc = struct.unpack("<4sBI", data[:9])
    assert (magic, version, crc) == (b"RNPQ", 4, zlib.crc32(data[9:]))
    assert struct.unpack("<BBBI", data[9:16]) == (14, 1, bits, len(floats))
    assert data[16:] == table + floats + symbols

    shapes = {part.record.name: part.record.shape for part in parts}
    *found, sections, read = container.read(data, lambda n: shapes if n == 14 else None)
    assert found == [14, "packed", bits]
    assert sections == {"header": 16, "table": len(table), "floats": len(floats),
                        "symbols": len(symbols)}
    for part, wanted in zip(read, parts, strict=True):
        assert part.record == wanted.record
        assert np.array_equal(part.floats, wanted.floats.ravel())
        assert part.symbols is None or np.array_equal(part.symbols, wanted.symbols)


def test_values_of_all_kinds():
    parts, *_ = parts_of_all_kinds(32)
    values = [container.value_of(part) for part in parts]
    assert all(value.dtype == np.float32 for value in values)
    float_, norm, masked, levels, steps, codes = values
    assert np.array_equal(float_, parts[0].floats) and np.array_equal(norm, parts[1].floats)
    a, b, c = parts[2].floats
    assert masked.tolist() == [[0, a], [0, 0], [b, 0], [c, 0]]
    assert levels.ravel().tolist() == [-0.5, 0, 0, 0.75, 0, -0.5] and levels.shape == (3, 1, 2, 1)
    assert steps.tolist() == [[0, -1, 1], [2, 0, 0]]
    assert codes.tolist() == [[-1, 0], [1, 0]]


def test_a_file_without_symbols_has_none():
    parts = [Part(Record("norm", (2, 2), "float"), np.ones((2, 2), np.float32), None)]
    for coder in container.CODERS:
        data = container.write(8, coder, 32, parts)
        _, _, _, sections, read = container.read(data, lambda n: {"norm": (2, 2)})
        assert sections["symbols"] == 0 and read[0].symbols is None
        more = data[9:] + b"\0"
        with pytest.raises(CompressionError, match="the file must end after byte"):
            container.read(with_checksum(more), lambda n: {"norm": (2, 2)})


@pytest.mark.parametrize("record, fits", [
    (Record("a.weight", (2,), "float", 0, 0), True),
    (Record("a.bias", (2,), "float", 0, 0), True),
    (Record("a.weight", (2,), "masked", 2, 0), True),
    (Record("a.weight", (2,), "masked", 2, 1), False),
    (Record("a.weight", (2,), "masked", 3, 0), False),
    (Record("a.weight", (2,), "masked", 1, 0), False),
    (Record("a.weight", (2,), "masked", 0, 0), False),
    (Record("a.bias", (2,), "masked", 2, 0), False),
    *((Record("a.weight", (2,), kind, n_levels, zero), fits)
      for kind in ("levels", "steps", "codes")
      for n_levels, zero, fits in [(1, 0, True), (257, 256, True), (257, 0, True), (258, 0, False),
                                   (0, 0, False), (3, 3, False), (3, 2, True), (3, 4, False)]),
    *((Record("a.bias", (2,), kind, 3, 1), False) for kind in ("levels", "steps", "codes")),
], ids=str)
def test_what_a_tensor_may_be_said_to_be(record, fits):
    reader = ByteReader(container._record_bytes(record), "the table")
    if fits:
        assert container._read_record(record.name, (2,), reader) == record
        reader.end()
    else:
        with pytest.raises(CompressionError) as caught:
            container._read_record(record.name, (2,), reader)
        assert str(caught.value) == (
            f"{record.name} cannot be of kind {record.kind} with {record.n_levels} levels and zero "
            f"at {record.zero}")


@pytest.mark.parametrize("bits", [16, 7])
def test_floats_up_to_the_largest_of_16_bits(bits):
    values = np.array([[65504.0, 0.0, -65504.0]], np.float32)
    if bits == 16:
        read = container.decode_floats(ByteReader(container.encode_floats(values, 16), "floats"),
                                       (1, 3), 16)
        assert np.array_equal(read, values)
    # with fewer bits only the least value and the step of a row are told with 16
    for value in (65505.0, -65505.0) if bits == 16 else (-65505.0,):
        with pytest.raises(CompressionError) as caught:
            container.encode_floats(np.array([[1.0, value]], np.float32), bits)
        assert str(caught.value) == (
            "values must be at most 65504.0 with float_bits below 32, got 65505.0")


@pytest.mark.parametrize("value", [0.0, -2.5, 65504.0])
def test_a_row_of_one_value_has_a_step_of_zero(value):
    with np.errstate(all="raise"):
        data = container.encode_floats(np.full((1, 3), value, np.float32), 7)
    assert data == struct.pack("<ee", value, 0.0) + bytes(3)


@pytest.mark.parametrize("value, towards, expected", [
    (1.0, math.inf, 1.0), (1.0, -math.inf, 1.0),
    (1.0001, math.inf, 1 + 2**-10), (1.0001, -math.inf, 1.0),
    (1.0009, math.inf, 1 + 2**-10), (1.0009, -math.inf, 1.0),
    (-1.0001, math.inf, -1.0), (-1.0001, -math.inf, -1 - 2**-10),
    (0.0, math.inf, 0.0), (1e-9, math.inf, 2**-24), (1e-9, -math.inf, 0.0),
])
def test_rounding_to_16_bits_on_one_side(value, towards, expected):
    assert float(container._float16(np.float64(value), towards)) == expected


# ---------------------------------------------------------------- damaged and hostile files


def with_checksum(body, version=container.VERSION, magic=container.MAGIC):
    return container.START.pack(magic, version, zlib.crc32(body)) + body


def split(data):
    """Return [header fields], table, floats, symbols of a file."""
    sizes, at, sections = describe(data)[0], container.START.size, []
    for size in (container.HEADER.size, sizes["table"], sizes["floats"], sizes["symbols"]):
        sections.append(data[at:at + size])
        at += size
    return [list(container.HEADER.unpack(sections[0])), *sections[1:]]


def joined(fields, table, floats, symbols):
    """The opposite of split, with a valid checksum and length of the floats, unless said otherwise.
    """
    n_floats = len(floats) if len(fields) == 3 else fields[3]
    header = container.HEADER.pack(*fields[:3], n_floats)
    return with_checksum(header + table + floats + symbols)


def is_refused(data, traced=False):
    """Whether decompress refuses `data`; if it does not, the net must be sound. Bounded in time and
    memory.
    """
    started = time.perf_counter()
    if traced:
        tracemalloc.start()
    try:
        net = decompress(data)
    except CompressionError as error:
        assert str(error)
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]  # 0 if not traced
        tracemalloc.stop()
        assert peak < 20e6 and time.perf_counter() - started < 20
    assert net.num_layers == 8 and all(
        torch.isfinite(tensor).all() for tensor in net.state_dict().values()
    )
    return False


# each coder and each number of bits, but not all pairs: floats and symbols are read separately
FILES = [("none", 32), ("packed", 16), ("packed", 7), ("context", 32), ("context", 7)]


@pytest.fixture(scope="module")
def small():
    """{(coder, float_bits): file} of small nets; levels and steps with 32 bits, codes with fewer,
    masks in all.
    """
    with torch.no_grad():
        learned = lively_net(Nbits=3, quantizer=Learned)
        nets = {32: lively_net(Nbits=2), 16: learned, 7: learned}
        nets[32].body_op[2].conv2 = learned.body_op[2].conv2
        files = {(coder, bits): compress(nets[bits], coder, bits)
                 for coder, bits in [*FILES, ("packed", 32)]}
    kinds = {record.kind for data in files.values() for record, *_ in describe(data)[1]}
    assert kinds == set(container.KINDS)
    return files


def test_every_truncation_and_extension_is_refused(small):
    data = small["context", 7]
    for n in [*range(0, 40), *range(40, len(data), 499), len(data) - 1]:
        assert is_refused(data[:n])
        if n > container.START.size:
            assert is_refused(with_checksum(data[container.START.size:n]))
    for more in (b"\0", b"\0\0\0\0", b"PK"):
        assert is_refused(data + more)
        assert is_refused(with_checksum(data[container.START.size:] + more))


def test_every_flipped_bit_is_noticed(small):
    data = small["context", 7]
    rng = np.random.default_rng(0)
    for position in [*range(30), *rng.integers(0, len(data), 200)]:
        altered = bytearray(data)
        altered[position] ^= 1 << rng.integers(0, 8)
        assert is_refused(bytes(altered))


def test_damage_says_checksum(small):
    data = bytearray(small["packed", 32])
    data[-1] ^= 1
    with pytest.raises(CompressionError, match="damaged: its checksum"):
        decompress(bytes(data))


def test_floats_too_many_are_refused(small):
    fields, table, floats, symbols = split(small["packed", 32])
    with pytest.raises(CompressionError, match="the floats must end after byte"):
        decompress(joined(fields[:3], table, floats + bytes(4), symbols))


@pytest.mark.parametrize("key", FILES, ids=str)
def test_altered_files_with_a_valid_checksum(key, small):
    """Bits flipped, bytes cut out, put in, copied elsewhere, in every section; then the checksum
    made right.
    """
    fields, *sections = split(small[key])
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        altered = [bytearray(s) for s in sections]
        section = altered[rng.choice([i for i in range(3) if altered[i]])]
        a, b = sorted(rng.integers(0, len(section) + 1, 2))
        kind = rng.integers(0, 5)
        if kind == 0:
            section[min(a, len(section) - 1)] ^= 1 << rng.integers(0, 8)
        elif kind == 1:
            del section[a:min(b, a + 8)]
        elif kind == 2:
            section[a:a] = rng.bytes(rng.integers(1, 9))
        elif kind == 3:
            section[a:a] = section[b:b + 16]
        else:
            section[a : a + 4] = struct.pack("<I", rng.choice([0, 1, 2**16 - 1, 2**31, 2**32 - 1]))[
                : len(section) - a
            ]
        refused += is_refused(joined(fields[:3], *altered))
    assert refused >= 10


@pytest.mark.parametrize("offset", range(container.HEADER.size))
def test_header_with_any_byte(offset, small):
    data = small["context", 7][container.START.size:]
    for value in (0, 1, 7, 14, 16, 110, 127, 128, 254, 255):
        if value != data[offset]:
            assert is_refused(with_checksum(data[:offset] + bytes([value]) + data[offset + 1:]))


@pytest.mark.parametrize("change, message", [
    (dict(num_layers=110), "kind|must go on"),
    (dict(num_layers=9), "number of layers must be one of .8, 14, .* got 9"),
    (dict(num_layers=116), "number of layers must be one of .8, 14, .* got 116"),
    (dict(coder=200), "coder must be one of .0, 1, 2., got 200"),
    (dict(coder=3), "coder must be one of .0, 1, 2., got 3"),
    (dict(float_bits=64), "bits of a float must be one of .32, 16, 7., got 64"),
    (dict(coder=0), "without a coder has no masked: head_conv.0.conv.weight"),
    (dict(n_floats=2**32 - 1), "the file must go on for 4294967295 bytes"),
], ids=str)
def test_header_fields_are_checked(change, message, small):
    fields, *sections = split(small["packed", 32])
    names = ["num_layers", "coder", "float_bits", "n_floats"]
    data = joined([change.get(name, value) for name, value in zip(names, fields)], *sections)
    with pytest.raises(CompressionError, match=message):
        decompress(data)
    assert is_refused(data, traced=True)


def table_with(data, name, *told):
    """The table of a file, in which the record `name` is told as (kind, levels, zero) `told`."""
    table = b""
    for record, *_ in describe(data)[1]:
        kind, *levels = told if record.name == name else (
            container.KINDS.index(record.kind), record.n_levels, record.zero)
        table += bytes([kind]) + (struct.pack("<HH", *levels) if kind else b"")
    return table


@pytest.mark.parametrize("name, told, message", [
    (CONV, (77, 4, 1), "the kind of .* must be below 5, got 77"),
    (CONV, (5, 4, 1), "the kind of .* must be below 5, got 5"),
    (CONV, (2, 65535, 0), "conv.weight cannot be of kind levels with 65535 levels"),
    (CONV, (2, 258, 0), "cannot be of kind levels with 258 levels"),
    (CONV, (2, 0, 0), "cannot be of kind"),
    (CONV, (2, 4, 60000), "cannot be of kind"),
    (CONV, (1, 3, 0), "cannot be of kind masked"),
    (CONV, (0, 0, 0), "the floats must go on|symbols cannot be decoded"),
    ("head_conv.1", (2, 3, 0), "head_conv.1 cannot be of kind levels"),
    ("final_fc.linear.bias", (4, 3, 0), "bias cannot be of kind codes"),
], ids=str)
def test_table_entries_are_checked(name, told, message, small):
    fields, table, floats, symbols = split(small["packed", 32])
    assert table_with(small["packed", 32], "") == table
    altered = table_with(small["packed", 32], name, *told)
    data = joined(fields, altered, floats, symbols)
    with pytest.raises(CompressionError, match=message):
        decompress(data)
    assert is_refused(data, traced=True)


def test_tables_that_are_too_short_or_too_long(small):
    fields, table, floats, symbols = split(small["packed", 32])
    for altered in (table[:-1], table[:40], b"", table + b"\0", table + table):
        assert is_refused(joined(fields, altered, floats, symbols))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [("packed", 32), ("context", 7)], ids=str)
def test_floats_that_are_not_finite_are_refused(key, value, small):
    fields, table, floats, symbols = split(small[key])
    size = 4 if key[1] == 32 else 2
    not_finite = struct.pack("<f" if size == 4 else "<e", value)
    for at in (0, size):  # in a grid of 7 bits the first is the minimum, the second the step
        altered = floats[:at] + not_finite + floats[at + size:]
        with pytest.raises(CompressionError, match="the floats must be finite"):
            decompress(joined(fields[:3], table, altered, symbols))


def test_steps_that_overflow_are_refused():
    net = lively_net(Nbits=3, quantizer=Learned)
    data = compress(net, "packed")
    fields, table, floats, symbols = split(data)
    step = net.body_op[0].conv1[0].quantizer.step.numpy().astype("<f4").tobytes()
    altered = floats.replace(step, np.full(16, 3e38, "<f4").tobytes())
    assert altered != floats
    with pytest.raises(CompressionError, match="body_op.0.conv1.0.conv.weight must be finite"):
        decompress(joined(fields[:3], table, altered, symbols))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "must go on"),
        (b"RNPQ", "must go on"),
        (b"PK\x03\x04" + bytes(100), "must start with b'RNPQ'"),
        (pickle.dumps({"weights": list(range(100))}), "must start with"),
        (bytes(1000), "must start with"),
        (with_checksum(b"", version=2), "version must be 4, got 2; pack the checkpoint again"),
        (with_checksum(b""), "must go on"),
    ],
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(CompressionError, match=message):
        decompress(data)


def test_the_deepest_net_a_file_can_ask_for_stays_small(monkeypatch):
    """A few bytes that announce 110 layers are refused before tensors of that net exist."""
    devices = set()

    def noted(num_layers):
        devices.add(torch.empty(0).device.type)
        return ResNetCIFAR(num_layers)

    monkeypatch.setattr(network, "ResNetCIFAR", noted)
    for table in (b"", b"\1\2\0\0\0", b"\0" * 500):
        body = container.HEADER.pack(110, 2, 32, 0) + table
        assert is_refused(with_checksum(body), traced=True)
    assert devices == {"meta"}


# ---------------------------------------------------------------- command line


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_pack_info_unpack(tmp_path, capsys, images, monkeypatch):
    monkeypatch.setattr(command_line, "describe", described := functools.cache(describe))
    name, file, checkpoint = "lab3d_2bit_improved", tmp_path / "net.rnpq", tmp_path / "net.pt"
    shipped = load_checkpoint(name).eval()
    status, out, _ = run(capsys, "pack", name, file)
    size = file.stat().st_size
    assert f"{size:,} bytes, {4 * 272_474 / size:.2f} times smaller than 1,089,896 bytes" in out
    assert status == 0 and file.read_bytes() == compress(shipped)

    status, out, _ = run(capsys, "info", file)
    assert status == 0 and f"= {file.stat().st_size:,} bytes" in out
    assert all(name in out for name in stored_shapes(shipped))
    told, = (line.split() for line in out.splitlines() if line.startswith(CONV))
    (record, zeros, floats, symbols), = (
        row for row in described(file.read_bytes())[1] if row[0].name == CONV)
    shape = "x".join(map(str, record.shape))
    assert told == [CONV, shape, "steps", str(record.n_levels), f"{100 * zeros:.2f}",
                    str(floats), str(symbols),
                    f"{8 * (floats + symbols) / math.prod(record.shape):.3f}"]

    assert run(capsys, "unpack", file, checkpoint)[0] == 0
    net = load_weights(ResNetCIFAR(), checkpoint).eval()
    assert torch.equal(net(images[:20]), shipped(images[:20]))
    before = checkpoint.read_bytes()  # what is trained is not written over
    for command, source in (("unpack", file), ("pack", name)):
        status, _, err = run(capsys, command, source, checkpoint)
        assert status == 1 and "net.pt is there already" in err
        assert checkpoint.read_bytes() == before


def test_pack_by_path_with_options(tmp_path, capsys):
    for checkpoint in (
        weights_path("pretrain"),
        weights_path("lab2e_global"),
    ):
        name = "pretrain" if "pretrained" in checkpoint.name else checkpoint.stem
        out = tmp_path / name
        status, _, _ = run(capsys, "pack", checkpoint, out, "--coder", "packed", "--float-bits", 16)
        assert status == 0 and out.read_bytes() == compress(shipped_net(name), "packed", 16)


def small_checkpoint(folder, name="mine.pt", **quantizer):
    """A checkpoint that is no run's, of a ResNet-20 whose BatchNorms are not their defaults."""
    net = lively_net(20, **quantizer)
    save_weights(net, folder / name)
    return net, folder / name


PACKED = ["--coder", "packed"]  # sooner done


@pytest.mark.parametrize("options, quantizer", [
    (PACKED, {}),
    (["--bits", 4], dict(Nbits=4)),
    (["--bits", 0, *PACKED], dict(Nbits=0)),
    (["--bits", 1, "--quantizer", "minmax", *PACKED], dict(Nbits=1)),
    (["--bits", 3, "--symmetric", *PACKED], dict(Nbits=3, symmetric=True)),
    (["--bits", 2, "--quantizer", "learned", *PACKED], dict(Nbits=2, quantizer=Learned)),
    (["--symmetric", "--bits", 2, "--quantizer", "learned", *PACKED],
     dict(Nbits=2, symmetric=True, quantizer=Learned)),
], ids=str)
def test_pack_a_file_that_is_no_runs(options, quantizer, tmp_path, capsys, images):
    """Float weights, quantized as the options say; a learned step is the one it would start from.
    """
    net, checkpoint = small_checkpoint(tmp_path)
    expected = ResNetCIFAR(20, **quantizer)
    expected.load_state_dict(net.state_dict(), strict=False)
    fit_quantizers(expected)
    assert run(capsys, "pack", checkpoint, tmp_path / "file", *options)[0] == 0
    restored = decompress((tmp_path / "file").read_bytes())
    assert torch.equal(restored(images[:10]), expected.eval()(images[:10]))


@pytest.mark.parametrize("symmetric", [False, True])
def test_pack_a_file_with_its_learned_steps(symmetric, tmp_path, capsys, images):
    net = lively_net(20, Nbits=3, symmetric=symmetric, quantizer=Learned)
    for name, parameter in net.named_parameters():
        if name.endswith("quantizer.step"):
            parameter.mul_(1.3)  # as trained: no longer the fitted ones
    save_weights(net, tmp_path / "mine.pt")
    command = ["pack", tmp_path / "mine.pt", tmp_path / "file", "--bits", 3, *PACKED]
    command += ["--quantizer", "learned"] + ["--symmetric"] * symmetric
    assert run(capsys, *command)[0] == 0
    restored = decompress((tmp_path / "file").read_bytes())
    assert torch.equal(restored(images[:10]), net(images[:10]))


@pytest.mark.parametrize("options, message", [
    (["--bits", -1], "Nbits must be None, 0 or 1 to 16, got -1"),
    (["--bits", 17], "Nbits must be None, 0 or 1 to 16, got 17"),
    (["--bits", 1, "--symmetric"], "Nbits must be None, 0 or 2 to 16 when symmetric=True, got 1"),
    (["--bits", 0, "--quantizer", "learned"], "Nbits must be 2 to 16 for a learned step, got 0"),
    (["--bits", 1, "--quantizer", "learned"], "Nbits must be 2 to 16 for a learned step, got 1"),
    (["--symmetric"], "bits"),
    (["--quantizer", "learned"], "bits"),
    (["--quantizer", "minmax"], "bits"),
    (["--quantizer", "learned", "--symmetric"], "bits"),
], ids=str)
def test_options_that_do_not_fit_are_an_error_in_one_line(options, message, tmp_path, capsys):
    status, out, err = run(capsys, "pack", "lab3c_4bit", tmp_path / "file", *options)
    assert status == 1 and err.startswith("error: ") and message in err and not out
    assert err.count("\n") == 1 and not (tmp_path / "file").exists()


@pytest.mark.parametrize("quantizer, options", [
    (dict(Nbits=3, quantizer=Learned), []),
    (dict(Nbits=3, quantizer=Learned), ["--bits", 3]),
    (dict(Nbits=3, quantizer=Learned), ["--bits", 3, "--quantizer", "minmax"]),
], ids=str)
def test_steps_that_nothing_would_use_are_an_error(quantizer, options, tmp_path, capsys):
    _, checkpoint = small_checkpoint(tmp_path, **quantizer)
    status, out, err = run(capsys, "pack", checkpoint, tmp_path / "file", *options)
    assert status == 1 and "quantizer.step" in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("options", [
    ["--bits", "four"], ["--bits"], ["--quantizer", "log"], ["--coder", "zip"],
    ["--float-bits", "3"],
], ids=str)
def test_options_that_cannot_be_read_are_named(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["pack", "lab3c_4bit", str(tmp_path / "file"), *options])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and f"argument {options[0]}: " in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, bits", [("lab3c_4bit", 4), ("lab2e_global", None)])
def test_a_runs_file_elsewhere_and_one_of_another_seed_are_the_runs(name, bits, tmp_path):
    net, _ = small_checkpoint(tmp_path, f"{name}.pt")
    small_checkpoint(tmp_path, f"{name}@1.pt")
    for file in (f"{name}.pt", f"{name}@1.pt"):
        loaded = load_checkpoint(tmp_path / file)
        assert loaded.Nbits == bits
        assert torch.equal(loaded.head_conv[0].weight, net.head_conv[0].weight)


@pytest.mark.parametrize("file", ["mine.pth", "mine", "lab3c_4bit@old.pt"])
def test_a_file_that_is_no_runs_is_taken_as_it_is_whatever_its_name(file, tmp_path):
    net, path = small_checkpoint(tmp_path, file)
    loaded = load_checkpoint(path)
    assert loaded.Nbits is None
    assert torch.equal(loaded.head_conv[0].weight, net.head_conv[0].weight)


def test_bits_that_are_given_go_before_those_of_the_run(tmp_path):
    _, checkpoint = small_checkpoint(tmp_path, "lab3c_4bit.pt")
    assert load_checkpoint(checkpoint, 3).Nbits == 3
    _, of_learned = small_checkpoint(tmp_path, "lab3d_2bit_improved.pt")
    quantizer = load_checkpoint(of_learned, 3).body_op[0].conv1[0].quantizer
    assert quantizer.limits == (-3, 3)  # learned and symmetric, as the run has them
    learned = load_checkpoint(checkpoint, 3, True, "learned").body_op[0].conv1[0].quantizer
    assert learned.limits == (-3, 3)
    assert load_checkpoint(weights_path("pretrain")).Nbits is None
    assert not load_checkpoint(checkpoint).body_op[0].conv1[0].quantizer.symmetric
    with pytest.raises(ValueError, match="quantizer must be 'minmax' or 'learned', got 'lsq'"):
        load_checkpoint(checkpoint, 3, quantizer="lsq")
    assert load_checkpoint("lab3d_2bit_improved").body_op[0].conv1[0].quantizer.symmetric


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ("lab3c_5bits", "must be one of teacher, pretrain, lab2c"),
        ("lab3c_4bit@0", "must be one of teacher, pretrain, lab2c"),
        ("nothing/lab9.pt", "no checkpoint at nothing/lab9.pt"),
        ("nothing/lab3c_4bit.pt", "no checkpoint at"),
    ],
)
def test_pack_names_what_is_allowed(checkpoint, message, tmp_path, capsys):
    status, out, err = run(capsys, "pack", checkpoint, tmp_path / "out")
    assert status == 1 and message in err and not out and not list(tmp_path.iterdir())


def test_bad_files_are_errors_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"RNPQ" + bytes(50))
    (tmp_path / "out.pt").write_bytes(b"was here")
    for command in (["info", "bad"], ["unpack", "bad", "out.pt"], ["info", "none"]):
        status, out, err = run(capsys, command[0], *(tmp_path / name for name in command[1:]))
        assert status == 1 and err.startswith("error: ") and not out
    assert (tmp_path / "out.pt").read_bytes() == b"was here"
    (tmp_path / "folder").mkdir()
    assert run(capsys, "pack", "pretrain", tmp_path / "folder")[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "folder", "out.pt"]
