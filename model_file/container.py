"""Named tensors as the bytes of one file, and back: header, checksum, table, floats, symbols.

A file holds all that is needed to run a net, and no code. Integers and floats are little-endian.

    bytes    4  b"RNPQ"
             1  version
             4  CRC-32 of all that follows
       1, 1, 1  number of layers; coder, an index into CODERS; bits of a float
          2, 4  length of the table; length of the floats; the rest are the symbols
    table       each tensor's name, kind, shape, number of levels and index of the level at zero,
    under zlib floats      values that are no symbols, levels and steps, in the table's order, by
    encode_floats symbols     of all tensors, in the table's order, by coders.encode
"""

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from model_file import coders
from model_file.coders import Alphabet, ByteReader, CompressionError

MAGIC, VERSION = b"RNPQ", 1
# A CRC finds damage, in 4 bytes. A cryptographic hash would not keep out ill will either, as
# whoever alters a file can compute it anew: the reader has to stand any content.
START = struct.Struct("<4sBI")
HEADER = struct.Struct("<BBBHI")
# behind the name: kind, dimensions, levels, zero; then 2 bytes a dimension
RECORD = struct.Struct("<BBHH")

# "none": weights as floats. The order is the format's: add at the end
CODERS = ("none", *coders.CODERS)
FLOAT_BITS = (32, 16, 8, 7, 6, 5, 4)
KINDS = (
    "float",  # every value as a float
    "masked",  # symbols 0 and 1; the values at 1 as floats
    "levels",  # symbols; the value of each as a float
    "steps",  # symbols; (symbol - zero) times the output channel's step
    "codes",  # symbols; symbol - zero
)
# the deepest but one of He et al.'s nets for CIFAR-10; no file can ask for a larger net
MAX_LAYERS = 110
MAX_TABLE = 2**16  # bytes, unpacked; 110 layers need a seventh of it


class Record(NamedTuple):
    """What the table says of a tensor."""

    name: str
    shape: tuple
    kind: str
    n_levels: int = 0
    zero: int = 0

    @property
    def alphabet(self):
        """What a decoder knows of the tensor's symbols."""
        return Alphabet(self.shape, self.n_levels, self.zero)

    def float_layout(self, float_bits):
        """Return (rows, bits) of its floats; levels and steps keep 16 bits."""
        rows = self.shape[0] if self.kind == "float" and len(self.shape) > 1 else 1
        return rows, max(float_bits, 16) if self.kind in ("levels", "steps") else float_bits


class Part(NamedTuple):
    """A tensor in its file: the floats of its kind, and symbols (int64, of its shape) or None."""

    record: Record
    floats: np.ndarray
    symbols: np.ndarray | None


def along_channels(step, array):
    """Return the steps (channels,) shaped so that they multiply the first axis of `array`."""
    return step.reshape(-1, *[1] * (array.ndim - 1))


# ---------------------------------------------------------------- writing


def write(num_layers, coder, float_bits, parts):
    """Return the bytes of a file that holds `parts`, a list of Part."""
    table = zlib.compress(b"".join(_record_bytes(part.record) for part in parts), 9)
    floats = b"".join(float_bytes(part, float_bits) for part in parts)
    body = HEADER.pack(num_layers, CODERS.index(coder), float_bits, len(table), len(floats))
    body += table + floats + symbol_bytes(parts, coder)
    return START.pack(MAGIC, VERSION, zlib.crc32(body)) + body


def _record_bytes(record):
    name, shape = record.name.encode(), record.shape
    fields = RECORD.pack(KINDS.index(record.kind), len(shape), record.n_levels, record.zero)
    return bytes([len(name)]) + name + fields + struct.pack(f"<{len(shape)}H", *shape)


def float_bytes(part, float_bits):
    """Return the floats of a Part as bytes."""
    rows, bits = part.record.float_layout(float_bits)
    return encode_floats(part.floats.reshape(rows, part.floats.size // rows), bits)


def symbol_bytes(parts, coder):
    """Return the symbols of a list of Parts as bytes; none at all if no Part has symbols."""
    coded = [(part.symbols, part.record.alphabet) for part in parts if part.symbols is not None]
    return coders.encode(coder, *zip(*coded)) if coded else b""


# ---------------------------------------------------------------- reading


def read(data, expected):
    """Return (number of layers, coder, float bits, {section: bytes}, [Part]) of a file's bytes.

    expected(num_layers) returns {name: shape} of the tensors that a file of so many layers must
    hold, in order. Raises CompressionError for anything that `write` does not write; nothing is
    allocated before its size is checked.
    """
    reader = ByteReader(data, "the file")
    magic, version, crc = START.unpack(reader.take(START.size))
    if magic != MAGIC:
        raise CompressionError(f"the file must start with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise CompressionError(f"the file's version must be {VERSION}, got {version}")
    if crc != zlib.crc32(data[START.size:]):
        raise CompressionError("the file is damaged: its checksum does not match")
    num_layers, coder, float_bits, n_table, n_floats = HEADER.unpack(reader.take(HEADER.size))
    if num_layers not in range(8, MAX_LAYERS + 1, 6):
        raise CompressionError(
            f"the number of layers must be 8, 14, 20, ... {MAX_LAYERS}, got {num_layers}"
        )
    if coder >= len(CODERS):
        raise CompressionError(f"the coder must be below {len(CODERS)}, got {coder}")
    if float_bits not in FLOAT_BITS:
        raise CompressionError(f"bits of a float must be one of {FLOAT_BITS}, got {float_bits}")
    records = _read_table(reader.take(n_table), expected(num_layers))
    floats = ByteReader(reader.take(n_floats), "the floats")
    symbols = _read_symbols(CODERS[coder], records, reader)
    parts = [_read_part(record, symbols.get(record.name), floats, float_bits) for record in records]
    floats.end()
    sections = {"header": START.size + HEADER.size, "table": n_table, "floats": n_floats}
    return (num_layers,
            CODERS[coder],
            float_bits,
            sections | {"symbols": len(data) - sum(sections.values())},
            parts)


def _read_table(packed, expected):
    inflate = zlib.decompressobj()
    try:
        table = inflate.decompress(packed, MAX_TABLE)
    except zlib.error as error:
        raise CompressionError(f"the table cannot be read: {error}") from error
    if not inflate.eof or inflate.unused_data:
        raise CompressionError(
            f"the table must be one zlib stream of at most {MAX_TABLE} bytes unpacked"
        )
    reader, records = ByteReader(table, "the table"), []
    for name, shape in expected.items():
        read_name = reader.take(reader.take(1)[0])
        kind, n_dims, n_levels, zero = RECORD.unpack(reader.take(RECORD.size))
        read_shape = struct.unpack(f"<{n_dims}H", reader.take(2 * n_dims))
        if (read_name, read_shape) != (name.encode(), shape):
            raise CompressionError(
                f"tensor {len(records)} must be {name} {shape}, got {read_name!r} {read_shape}"
            )
        if kind >= len(KINDS):
            raise CompressionError(f"the kind of {name} must be below {len(KINDS)}, got {kind}")
        records.append(_checked(Record(name, shape, KINDS[kind], n_levels, zero)))
    reader.end()
    return records


def _checked(record):
    """Return the record, or raise CompressionError if no tensor can have its kind, levels and zero.
    """
    if record.kind in ("float", "masked"):
        fits = (record.n_levels, record.zero) == ((0, 0) if record.kind == "float" else (2, 0))
    else:
        fits = record.zero < record.n_levels <= coders.MAX_LEVELS
    if not fits or (record.kind != "float" and not record.name.endswith(".weight")):
        raise CompressionError(
            f"{record.name} cannot be of kind {record.kind} with {record.n_levels} levels and "
            f"zero at {record.zero}"
        )
    return record


def _read_symbols(coder, records, reader):
    """Return {name: symbols} of the records that have symbols, from all that is left in the reader.
    """
    coded = [record for record in records if record.kind != "float"]
    if not coded:
        reader.end()
        return {}
    if coder == "none":
        raise CompressionError(
            f"a file without a coder has no symbols, but {coded[0].name} is of kind {coded[0].kind}"
        )
    data = reader.take(len(reader.data) - reader.position)
    arrays = coders.decode(coder, data, [record.alphabet for record in coded])
    return {record.name: array for record, array in zip(coded, arrays)}


def _read_part(record, symbols, floats, float_bits):
    size = {"float": math.prod(record.shape),
            "levels": record.n_levels,
            "steps": record.shape[0],
            "codes": 0}
    n = int(symbols.sum()) if record.kind == "masked" else size[record.kind]
    rows, bits = record.float_layout(float_bits)
    return Part(record, decode_floats(floats, (rows, n // rows), bits).ravel(), symbols)


def value_of(part):
    """Return the tensor of a Part, float32; raises CompressionError beyond float32's range."""
    record, floats, symbols = part
    if record.kind == "float":
        return floats.reshape(record.shape)
    if record.kind == "masked":
        value = np.zeros(record.shape, np.float32)
        value[symbols == 1] = floats
        return value
    if record.kind == "levels":
        return floats[symbols]
    value = (symbols - record.zero).astype(np.float32)
    if record.kind == "steps":
        with np.errstate(over="ignore"):
            value *= along_channels(floats, value)
        if not np.isfinite(value).all():
            raise CompressionError(f"{record.name} must be finite, but its steps are too large")
    return value


# ---------------------------------------------------------------- floats


def encode_floats(values, bits):
    """Return finite float32 values, (rows, columns), as bytes.

    bits: 32, exact; 16, rounded to float16; 8 to 4, rounded to an even grid from each row's minimum
    to its maximum, which are kept as float16. Raises CompressionError if a value is beyond
    float16's range.
    """
    if bits == 32:
        return values.astype("<f4").tobytes()
    if bits == 16:
        return _float16(values).tobytes()
    data = b""
    for row in values.astype(np.float64) if values.size else ():
        # both rounded outwards, so that the grid reaches from end to end
        low = _float16(row.min(), -np.inf)
        step = _float16((row.max() - low) / (2**bits - 1), np.inf)
        codes = np.round((row - low) / (float(step) or 1.0)).clip(0, 2**bits - 1)
        data += np.array([low, step], "<f2").tobytes() + coders.pack([coders.to_bits(codes, bits)])
    return data


def decode_floats(reader, shape, bits):
    """Return values of `shape`, (rows, columns), float32, taken off a ByteReader.

    Raises CompressionError if there are too few bytes or a value is NaN or infinite.
    """
    rows, columns = shape
    if bits >= 16:
        values = np.frombuffer(reader.take(rows * columns * bits // 8), f"<f{bits // 8}").astype(
            np.float32
        )
    else:
        values = np.zeros(shape, np.float32)
        for row in values if values.size else ():
            low, step = np.frombuffer(reader.take(4), "<f2").astype(np.float32)
            codes = coders.bit_reader(reader.take(-(-columns * bits // 8)))(columns, bits)
            with np.errstate(invalid="ignore"):  # an infinite step; reported below
                row[:] = low + step * codes.astype(np.float32)
    if not np.isfinite(values).all():
        raise CompressionError(f"{reader.what} must be finite, got NaN or infinite values")
    return values.reshape(shape)


def _float16(values, towards=None):
    """Return values as float16: the nearest or, with towards=inf or -inf, the nearest on that side.
    """
    largest = np.abs(values).max(initial=0)
    if largest > np.finfo(np.float16).max:
        raise CompressionError(
            f"values must be at most {np.finfo(np.float16).max} with float_bits below 32, "
            f"got {largest}"
        )
    rounded = np.asarray(values).astype("<f2")
    if towards is not None and (float(rounded) - float(values)) * towards < 0:
        rounded = np.nextafter(rounded, np.float16(towards))
    return rounded
