"""What our files are compared with: coders against Shannon's bound and an enumeration of prefix
codes, the table and the figure against the files themselves.
"""

import heapq
import itertools
import json
import lzma
import math
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_net
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from test_coders import skewed

from benchmarks import codec, sizes
from experiments.records import read_record
from experiments.run import load_checkpoint
from experiments.runs import RUNS
from FP_layers import FP_Conv, FP_Linear, Learned
from model_file import coders, container
from model_file.coders import Alphabet
from model_file.container import symbol_bytes
from model_file.network import compress, describe

RUN = "lab3d_2bit_improved"


def length(method, array, alphabet):
    return len(sizes.SYMBOLS[method][0]([array.ravel()], [alphabet]))


def table(array, alphabet):
    """Bytes of the histogram."""
    return math.ceil((alphabet.n_levels - 1) * array.size.bit_length() / 8)


# ---------------------------------------------------------------- coders


@pytest.mark.parametrize("method", sizes.SYMBOLS)
@pytest.mark.parametrize("n_levels", [2, 3, 17, 257])
def test_decoding_gives_the_symbols_back(method, n_levels):
    cases = [skewed(seed, (16, 8, 3, 3), n_levels, seed) for seed in range(2)]
    arrays, alphabets = [array.ravel() for array, _ in cases], [a for _, a in cases]
    encoder, decoder = sizes.SYMBOLS[method]
    assert all(map(np.array_equal, arrays, decoder(encoder(arrays, alphabets), alphabets)))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n_levels", [2, 3, 5, 17])
def test_range_coding_takes_the_entropy(n_levels, seed):
    array, alphabet = skewed(seed, (32, 16, 3, 3), n_levels, n_levels // 2)
    bound = entropy(np.bincount(array.ravel()), base=2) * array.size / 8
    assert sizes.entropy_bytes([array.ravel()], [alphabet]) == pytest.approx(bound)
    words = length("range", array, alphabet) - table(array, alphabet)
    assert bound - 1 <= words <= 1.005 * bound + 8


def shortest_prefix_code(counts):
    """Bits of the best prefix code, by trying all code lengths that satisfy Kraft's inequality."""
    lengths = itertools.product(range(1, max(len(counts), 2)), repeat=len(counts))
    return min(
        sum(c * n for c, n in zip(counts, ls)) for ls in lengths if sum(2.0**-n for n in ls) <= 1
    )


def merged(counts):
    """Bits of Huffman's code: what merging the two rarest until one is left adds up to."""
    heap, bits = [int(c) for c in counts], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        bits += pair
        heapq.heappush(heap, pair)
    return bits


def huffman_bytes(array, alphabet):
    return length("Huffman", array, alphabet) - table(array, alphabet)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 200), min_size=2, max_size=5).filter(any))
def test_huffman_is_the_shortest_of_all_prefix_codes(counts):
    array = np.repeat(np.arange(len(counts)), counts)
    alphabet = Alphabet((sum(counts),), len(counts), 0)
    used = [count for count in counts if count]  # the histogram says which are not
    assert huffman_bytes(array, alphabet) == math.ceil(shortest_prefix_code(used) / 8)
    assert len(used) == 1 or merged(used) == shortest_prefix_code(used)


@pytest.mark.parametrize("n_levels", [17, 257])
def test_huffman_with_many_levels(n_levels):
    array, alphabet = skewed(0, (64, 32, 3, 3), n_levels, 3)
    counts = np.bincount(array.ravel())
    assert huffman_bytes(array, alphabet) == math.ceil(merged(counts[counts > 0]) / 8)


def test_xz_is_that_of_the_packed_symbols():
    array, alphabet = skewed(0, (32, 16, 3, 3), 3, 1)
    packed = coders.encode("packed", [array], [alphabet])
    with_preset = lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME)
    assert length("fixed width, then xz", array, alphabet) == len(with_preset)


# ---------------------------------------------------------------- a net's methods


def test_entropy_bound_is_counted_from_the_weights():
    """The same from nothing but the net's tensors."""
    net, bits = load_checkpoint("lab3c_4bit").eval(), 0
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (FP_Conv, FP_Linear))}
    with torch.no_grad():
        for name, layer in layers.items():
            weight = layer.quantized_weight()
            levels, counts = weight.unique(return_counts=True)
            bits += 32 * (len(levels) if name.startswith("body_op") else weight.numel())
            if name.startswith("body_op"):
                bits += float((counts * (counts.sum() / counts).log2()).sum())
    norms = (m.num_features for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    floats = 10 + 2 * sum(norms)
    assert sizes.entropy_bound(net) == pytest.approx(bits / 8 + 4 * floats, abs=1)


def test_methods_are_files_and_what_stands_in_their_place():
    net = make_net(Nbits=3, symmetric=True, quantizer=Learned).eval()
    net.body_op[0].conv1[0].conv.weight.data.zero_()  # a tensor with nothing to tell
    costs = sizes.methods(net)
    assert costs.keys() == sizes.FILES.keys() | sizes.SYMBOLS.keys()
    for method, how in sizes.FILES.items():
        assert costs[method].size == len(compress(net, *how))
    symbols = describe(compress(net, "packed"))[0]["symbols"]
    saved = costs["fixed width"].size - costs["range"].size
    assert 0 < saved < symbols
    assert costs["range"].size > sizes.entropy_bound(net) > 0
    assert all(min(cost.compress, cost.decompress) > 0 for cost in costs.values())


def test_a_coder_that_loses_symbols_is_noticed(monkeypatch):
    encoder, decoder = sizes.SYMBOLS["range"]
    lossy = {"range": (lambda arrays, a: encoder([0 * array for array in arrays], a), decoder)}
    monkeypatch.setattr(sizes, "SYMBOLS", lossy)
    with pytest.raises(RuntimeError, match="range must give the symbols back"):
        sizes.methods(make_net(Nbits=3))


# ---------------------------------------------------------------- the table and the figure


def test_the_table_has_every_shipped_run_and_method():
    written = sizes.read_sizes()
    others = {"lab3c_5bit", "lab3c_6bit"}  # not shipped, but a reader may have trained them
    shipped = {name for name, run in RUNS.items() if name != "teacher" and not run.held_out}
    assert written.keys() - others == shipped - others and len(written) > 15
    for run, files in written.items():
        assert files.keys() == sizes.FILES.keys() | sizes.SYMBOLS.keys()
        recorded = read_record(run)["test_accuracy"]
        for method, (size, accuracy) in files.items():
            rounded = method == sizes.SMALLEST
            assert abs(accuracy - recorded) < (0.02 if rounded else 6e-5), (run, method)
            assert 10_000 < size < 1_200_000


def test_the_table_has_the_lengths_of_the_files():
    files = sizes.read_sizes()[RUN]
    for method, how in sizes.FILES.items():
        assert files[method][0] == len(compress(load_checkpoint(RUN), *how))


def test_the_figure_shows_the_smallest_file_of_each_run_and_what_others_report():
    written, ax = sizes.read_sizes(), plt.figure().add_subplot()
    sizes.plot(written, ax)
    shown = {(x, round(y, 2)) for line in ax.lines for x, y in zip(*line.get_data())}
    left_out = [run for run, files in written.items()
                if (files[sizes.SMALLEST][0], round(100 * files[sizes.SMALLEST][1], 2))
                not in shown]
    assert left_out == ["lab3d_2bit_unmasked"] and written["lab3d_2bit_unmasked"]
    assert sizes.smallest(written).keys() == written.keys() - {*left_out}
    assert (44_000, 90.76) in shown
    plt.close("all")


def test_the_figure_that_is_shipped_is_a_picture():
    assert sizes.FIGURE.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "benchmarks/frontier.png" in (REPOSITORY / "README.md").read_text()


def test_the_command_writes_table_figure_and_file(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "SHIPPED", tmp_path)
    monkeypatch.setattr(sizes, "CSV", tmp_path / "sizes.csv")
    monkeypatch.setattr(sizes, "FIGURE", tmp_path / "frontier.png")
    few = {name: RUNS[name] for name in ("pretrain", RUN)}
    monkeypatch.setattr(sizes, "RUNS", few)
    monkeypatch.setattr(sizes, "evaluate", lambda net: (0.0, 0.8765))
    assert sizes.main() == 0
    rows = (tmp_path / "sizes.csv").read_text().splitlines()
    assert rows[0] == "run,method,bytes,accuracy" and len(rows) == 1 + 2 * 7
    recorded = sizes.read_sizes(tmp_path / "sizes.csv")[RUN]
    assert recorded["context, 7-bit floats"][1] == 0.8765
    assert recorded["context"] == (len(compress(load_checkpoint(RUN))),
                                   round(read_record(RUN)["test_accuracy"], 4))
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    file = (tmp_path / f"{RUN}.rnpq").read_bytes()
    assert file == compress(load_checkpoint(RUN), "context", 7)


# ---------------------------------------------------------------- the codec of a standard


@pytest.fixture
def nncodec(monkeypatch, tmp_path):
    """In NNCodec's place, one that takes ten bytes and remembers; returns what it was given."""
    given = {}

    def compress(arrays, bitstream_path, return_bitstream):
        given.update(arrays)
        return bytes(10)

    nnc = SimpleNamespace(compress=compress, decompress=lambda coded: given)
    monkeypatch.setitem(sys.modules, "nncodec", SimpleNamespace(nnc=nnc))
    monkeypatch.setattr(codec.importlib.metadata, "version", lambda name: "2.1.3")
    monkeypatch.setattr(codec, "RESULTS", tmp_path / "codec.json")
    return given


def test_both_codecs_get_the_same_symbols(nncodec):
    assert codec.main() == 0
    results = json.loads(codec.RESULTS.read_text())
    assert results == {"run": codec.AS_FILE, "NNCodec": "2.1.3", "bytes": 10,
                       "ours": len(symbol_bytes(codec.coded_parts(), "context"))}
    for part, array in zip(codec.coded_parts(), nncodec.values(), strict=True):
        assert array.dtype == np.int32 and array.shape == part.record.shape
        zeros = container.value_of(part) == 0
        assert np.array_equal(array == 0, zeros) and zeros.any()


def test_a_codec_that_loses_something_is_refused(nncodec, monkeypatch):
    nnc = sys.modules["nncodec"].nnc
    nnc.decompress = lambda coded: {name: array + 1 for name, array in nncodec.items()}
    with pytest.raises(RuntimeError, match="NNCodec must give the symbols back"):
        codec.main()
    assert not codec.RESULTS.exists()


def test_what_is_recorded_of_our_coder_is_what_it_takes_now():
    assert json.loads(codec.RESULTS.read_text())["ours"] == len(
        symbol_bytes(codec.coded_parts(), "context"))
