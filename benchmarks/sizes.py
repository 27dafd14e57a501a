"""Every shipped network as a file, by every method: sizes.csv, the frontier as a figure, and one
of the files.

    python -m benchmarks.sizes     about five minutes on two cores: each file with rounded floats is
                                   evaluated on all test images
"""

import csv
import heapq
import io
import lzma
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.records import SHIPPED, read_record
from experiments.run import load_checkpoint, load_or_train
from experiments.runs import RUNS
from files import atomic_write
from model_file import coders, container
from model_file.coders import Alphabet
from model_file.network import compress, decompress, parts_of
from model_file.range_coder import ONE, RangeDecoder, RangeEncoder
from report import figures
from train_utils import evaluate

HERE = Path(__file__).parent
CSV, FIGURE = HERE / "sizes.csv", HERE / "frontier.png"
HEADER = ["run", "method", "bytes", "accuracy"]

FILES = {  # method: (coder, float_bits) of a file; 32 bits give the net's logits exactly
    "float32": ("none", 32),
    "fixed width": ("packed", 32),
    "context": ("context", 32),
    "context, 7-bit floats": ("context", 7),
}
SMALLEST = "context, 7-bit floats"
AS_FILE = "lab3d_2bit_improved"  # the run whose smallest file is shipped
FILE_GOALS = {0.915: 27_000, 0.900: 21_500}  # accuracy as a fraction, at least: bytes, at most

# Ternary ResNet-20 on CIFAR-10, 73 % zeros, bytes counted from that: Marban et al., "Learning
# Sparse & Ternary Neural Networks with Entropy-Constrained Trained Ternarization", CVPRW 2020.
PUBLISHED = {"EC2T, counted": (44_000, 0.9076)}


class Cost(NamedTuple):
    """What a method takes for a net: bytes, and seconds there and back."""

    size: int
    compress: float
    decompress: float


def methods(net):
    """Return {method: Cost} of a ResNetCIFAR: the files of FILES, and other coders' symbols.

    Those of SYMBOLS stand in place of the symbols in the file with a fixed width. Each is decoded
    and compared. Raises as compress does.
    """
    costs = {}
    for method, (coder, float_bits) in FILES.items():
        data, seconds = _timed(compress, net, coder, float_bits)
        costs[method] = Cost(len(data), seconds, _timed(decompress, data)[1])
    whole = parts_of(net, "packed", 32)
    parts = [part for part in whole
             if part.symbols is not None and part.record.alphabet.is_told]
    arrays = [part.symbols.ravel() for part in parts]
    alphabets = [part.record.alphabet for part in parts]
    base = costs["fixed width"]
    rest = base.size - len(container.symbol_bytes(whole, "packed"))
    for method, (encoder, decoder) in SYMBOLS.items():
        coded, seconds = _timed(encoder, arrays, alphabets)
        decoded, back = _timed(decoder, coded, alphabets)
        if not all(map(np.array_equal, arrays, decoded)):
            raise RuntimeError(f"{method} must give the symbols back")
        costs[method] = Cost(rest + len(coded), base.compress + seconds, base.decompress + back)
    return costs


def _timed(function, *args):
    started = time.perf_counter()
    return function(*args), time.perf_counter() - started


def entropy_bytes(arrays, alphabets):
    """Return the empirical entropy of flat arrays, in bytes, by the histogram of each.

    No coder that goes by the histograms alone can be shorter; one that looks at neighbours can.
    Source: Shannon, "A Mathematical Theory of Communication", 1948, theorem 9.
    """
    bits = 0.0
    for counts in _histograms(arrays, alphabets):
        counts = counts[counts > 0]
        bits += float((counts * np.log2(counts.sum() / counts)).sum())
    return bits / 8


def entropy_bound(net):
    """Return the bytes of a net's float32 values and of its symbols' entropy, rounded up."""
    parts = parts_of(net)
    coded = [part for part in parts if part.symbols is not None]
    symbols = entropy_bytes([part.symbols.ravel() for part in coded],
                            [part.record.alphabet for part in coded])
    return int(np.ceil(symbols)) + sum(len(container.float_bytes(part, 32)) for part in parts)


# ---------------------------------------------------------------- coders to compare with


def _histograms(arrays, alphabets):
    return [np.bincount(array, minlength=a.n_levels) for array, a in zip(arrays, alphabets)]


def _encode_xz(arrays, alphabets):
    packed = coders.encode("packed", arrays, alphabets)
    return lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME)


def _decode_xz(data, alphabets):
    arrays = coders.decode("packed", lzma.decompress(data), alphabets)
    return [array.ravel() for array in arrays]


def _count_alphabets(alphabets):
    """Return what is known of the histograms but their last counts, which follow from the sizes."""
    return [Alphabet((a.n_levels - 1,), a.size + 1, 0) for a in alphabets]


def _with_counts(histograms, alphabets, coded):
    counts = [counts[:-1] for counts in histograms]
    return coders.encode("packed", counts, _count_alphabets(alphabets)) + coded


def _counts_of(data, alphabets):
    """Return (histograms, the bytes behind them)."""
    told = _count_alphabets(alphabets)
    end = -(-sum(a.size * (a.n_levels - 1).bit_length() for a in told) // 8)
    histograms = [np.append(counts, a.size - counts.sum())
                  for counts, a in zip(coders.decode("packed", data[:end], told), alphabets)]
    return histograms, data[end:]


def _huffman_codes(counts):
    """Return {symbol: its bits, as text}. Source: Huffman, 1952."""
    heap = [(int(n), s, {s: ""}) for s, n in enumerate(counts) if n]
    if len(heap) == 1:
        return {heap[0][1]: "0"}
    heapq.heapify(heap)
    while len(heap) > 1:
        (n, s, zeros), (m, _, ones) = heapq.heappop(heap), heapq.heappop(heap)
        codes = {t: bit + code for bit, part in (("0", zeros), ("1", ones))
                 for t, code in part.items()}
        heapq.heappush(heap, (n + m, s, codes))
    return heap[0][2]


def _encode_huffman(arrays, alphabets):
    text, histograms = "", _histograms(arrays, alphabets)
    for array, counts in zip(arrays, histograms):
        text += "".join(map(_huffman_codes(counts).__getitem__, array.tolist()))
    bits = np.frombuffer(text.encode(), np.uint8) - ord("0")
    return _with_counts(histograms, alphabets, np.packbits(bits).tobytes())


def _decode_huffman(data, alphabets):
    histograms, coded = _counts_of(data, alphabets)
    bits, arrays = map(str, np.unpackbits(np.frombuffer(coded, np.uint8))), []
    for a, counts in zip(alphabets, histograms):
        symbols, known = {code: s for s, code in _huffman_codes(counts).items()}, ""
        array = []
        while len(array) < a.size:
            known += next(bits)
            if known in symbols:
                array.append(symbols[known])
                known = ""
        arrays.append(np.array(array))
    return arrays


def _by_histogram(coder, counts, size, array=None):
    """Code `size` symbols by a RangeEncoder, or by a RangeDecoder, and return them.

    A symbol is told bit by bit, the highest first, each as likely as the histogram has it behind
    the bits that are known.
    """
    n_bits = (len(counts) - 1).bit_length()
    counts = np.pad(counts, (0, 2**n_bits - len(counts)))
    known = np.zeros(size, np.int64)
    for shift in range(n_bits - 1, -1, -1):
        both = counts.reshape(-1, 2, 2**shift).sum(2)
        ones = np.clip(ONE * both[:, 1] // np.maximum(both.sum(1), 1), 1, ONE - 1)
        bits = None if array is None else array >> shift & 1
        known = 2 * known + coder(ones[known], bits)
    return known


def _encode_range(arrays, alphabets):
    coder, histograms = RangeEncoder(), _histograms(arrays, alphabets)
    for array, counts in zip(arrays, histograms):
        _by_histogram(coder, counts, len(array), array)
    return _with_counts(histograms, alphabets, coder.finish())


def _decode_range(data, alphabets):
    histograms, coded = _counts_of(data, alphabets)
    coder = RangeDecoder(coded)
    return [_by_histogram(coder, counts, a.size) for a, counts in zip(alphabets, histograms)]


SYMBOLS = {  # method: (encoder, decoder) of flat arrays of symbols
    "Huffman": (_encode_huffman, _decode_huffman),
    "range": (_encode_range, _decode_range),
    "fixed width, then xz": (_encode_xz, _decode_xz),
}


# ---------------------------------------------------------------- the table and the figure


def rows_of(run):
    """Return rows (see HEADER) of a shipped run; files with rounded floats are evaluated."""
    net, record = load_or_train(run)
    rows = []
    for method, cost in methods(net).items():
        accuracy = record["test_accuracy"]
        if method == SMALLEST:
            device = next(net.parameters()).device
            accuracy = evaluate(decompress(compress(net, *FILES[method])).to(device))[1]
        rows.append([run, method, cost.size, round(accuracy, 4)])
    return rows


def read_sizes(path=CSV):
    """Return {run: {method: (bytes, accuracy as a fraction)}} of the file that main writes."""
    sizes = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            told = int(row["bytes"]), float(row["accuracy"])
            sizes.setdefault(row["run"], {})[row["method"]] = told
    return sizes


def smallest(sizes):
    """Return {run: (bytes, accuracy as a fraction)} of the smallest file of each run of `sizes`.

    The run whose zeros are not held is left out: it is small, and right for few images.
    """
    return {run: files[SMALLEST] for run, files in sizes.items() if run != "lab3d_2bit_unmasked"}


def plot(sizes, ax):
    """Draw the smallest file of each run, and what others report, on `ax`, and return it."""
    figures.plot_frontier(smallest(sizes), ax, sizes["pretrain"]["float32"][1], PUBLISHED)
    ax.set(xlim=(9_000, 400_000), ylim=(84.5, 94.5))
    return ax


def main():
    """Write the table of all runs and methods, its figure, and the shipped file; return 0.

    The teacher is left out: the file's format is for the homework's network.
    """
    runs = [name for name, run in RUNS.items()
            if run.width == 16 and not run.held_out and read_record(name)]
    rows = []
    for run in runs:
        print(run, flush=True)
        rows += rows_of(run)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *rows])
    with atomic_write(CSV) as file:
        file.write(text.getvalue().encode())
    picture = io.BytesIO()
    plot(read_sizes(CSV), figures.axes()).figure.savefig(picture, metadata={"Software": None})
    with atomic_write(FIGURE) as file:
        file.write(picture.getvalue())
    data = compress(load_checkpoint(AS_FILE), *FILES[SMALLEST])
    with atomic_write(SHIPPED / f"{AS_FILE}.rnpq") as file:
        file.write(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
