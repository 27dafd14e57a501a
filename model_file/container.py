"""Named tensors as the bytes of one file, and back: header, checksum, table, floats, symbols.

A file holds all that is needed to run a net, and no code. Integers and floats are little-endian.

    4 bytes  b"RNPQ"
    1        version
    4        CRC-32 of all that follows
    1, 1, 1  number of layers; coder, an index into CODERS; bits of a float
    4        length of the floats
    table    each tensor's kind, in the order of a net of so many layers; of all but "float" also
             the number of levels and the index of the level at zero, 2 bytes each
    floats   values that are no symbols, levels and steps, by encode_floats
    symbols  the rest: of all tensors, by coders.encode
"""

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from model_file import coders
from model_file.coders import Alphabet, ByteReader, CompressionError

MAGIC, VERSION = b"RNPQ", 4
# A CRC finds damage. It keeps out no ill will, nor would a hash: the reader stands any content.
START = struct.Struct("<4sBI")
HEADER = struct.Struct("<BBBI")
LEVELS = struct.Struct("<HH")

CODERS = ("none", *coders.CODERS)  # "none": weights as floats. The order is the format's
FLOAT_BITS = (32, 16, 7)
KINDS = (
    "float",  # every value as a float
    "masked",  # symbols 0 and 1; the values at 1 as floats
    "levels",  # symbols; the value of each as a float
    "steps",  # symbols; (symbol - zero) times the output channel's step
    "codes",  # symbols; symbol - zero
)
DEPTHS = tuple(range(8, 111, 6))  # layers of a net; no file can ask for a deeper one


class Record(NamedTuple):
    """What is known of a tensor: name and shape from the net, the rest from the table."""

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


def write(num_layers, coder, float_bits, parts):
    """Return the bytes of a file that holds `parts`, a list of Part."""
    table = b"".join(_record_bytes(part.record) for part in parts)
    floats = b"".join(float_bytes(part, float_bits) for part in parts)
    body = HEADER.pack(num_layers, CODERS.index(coder), float_bits, len(floats))
    body += table + floats + symbol_bytes(parts, coder)
    return START.pack(MAGIC, VERSION, zlib.crc32(body)) + body


def _record_bytes(record):
    kind = bytes([KINDS.index(record.kind)])
    return kind if record.kind == "float" else kind + LEVELS.pack(record.n_levels, record.zero)


def float_bytes(part, float_bits):
    """Return the floats of a Part as bytes."""
    rows, bits = part.record.float_layout(float_bits)
    return encode_floats(part.floats.reshape(rows, part.floats.size // rows), bits)


def symbol_bytes(parts, coder):
    """Return the symbols of a list of Parts as bytes, none if no Part has any."""
    coded = [(part.symbols, part.record.alphabet) for part in parts if part.symbols is not None]
    return coders.encode(coder, *zip(*coded)) if coded else b""


def read(data, expected):
    """Return (number of layers, coder, float bits, {section: bytes}, [Part]) of a file's bytes.

    expected(num_layers): {name: shape} of a net's tensors, in order. Raises CompressionError for
    bytes that are damaged or of another format; nothing is allocated before its size is checked.
    """
    reader = ByteReader(data, "the file")
    magic, version, crc = START.unpack(reader.take(START.size))
    if magic != MAGIC:
        raise CompressionError(f"a file that `pack` wrote must start with {MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise CompressionError(f"the file's version must be {VERSION}, got {version}; "
                               "pack the checkpoint again")
    if crc != zlib.crc32(data[START.size:]):
        raise CompressionError("the file is damaged: its checksum does not match")
    num_layers, coder, float_bits, n_floats = HEADER.unpack(reader.take(HEADER.size))
    for what, value, allowed in (("number of layers", num_layers, DEPTHS),
                                 ("coder", coder, tuple(range(len(CODERS)))),
                                 ("bits of a float", float_bits, FLOAT_BITS)):
        if value not in allowed:
            raise CompressionError(f"{what} must be one of {allowed}, got {value}")
    header = reader.position
    records = [_read_record(name, shape, reader) for name, shape in expected(num_layers).items()]
    table, floats = reader.position - header, ByteReader(reader.take(n_floats), "the floats")
    symbols = _read_symbols(CODERS[coder], records, reader)
    parts = [_read_part(record, symbols.get(record.name), floats, float_bits) for record in records]
    floats.end()
    sizes = header, table, n_floats, len(data) - header - table - n_floats
    sections = dict(zip(("header", "table", "floats", "symbols"), sizes))
    return num_layers, CODERS[coder], float_bits, sections, parts


def _read_record(name, shape, reader):
    """Return the next record; raises CompressionError if no such tensor can be of its kind."""
    kind = reader.take(1)[0]
    if kind >= len(KINDS):
        raise CompressionError(f"the kind of {name} must be below {len(KINDS)}, got {kind}")
    if kind == 0:
        return Record(name, shape, "float")
    record = Record(name, shape, KINDS[kind], *LEVELS.unpack(reader.take(LEVELS.size)))
    fits = ((record.n_levels, record.zero) == (2, 0) if record.kind == "masked"
            else record.zero < record.n_levels <= coders.MAX_LEVELS)
    if not fits or not name.endswith(".weight"):
        raise CompressionError(f"{name} cannot be of kind {record.kind} with {record.n_levels} "
                               f"levels and zero at {record.zero}")
    return record


def _read_symbols(coder, records, reader):
    """Return {name: symbols} of the records that have some, from all that is left in the reader."""
    coded = [record for record in records if record.kind != "float"]
    if not coded:
        reader.end()
        return {}
    if coder == "none":
        raise CompressionError(f"a file without a coder has no {coded[0].kind}: {coded[0].name}")
    data = reader.take(len(reader.data) - reader.position)
    arrays = coders.decode(coder, data, [record.alphabet for record in coded])
    return {record.name: array for record, array in zip(coded, arrays)}


def _read_part(record, symbols, floats, float_bits):
    n = {"float": math.prod(record.shape), "levels": record.n_levels, "steps": record.shape[0],
         "codes": 0, "masked": 0 if symbols is None else int(symbols.sum())}[record.kind]
    rows, bits = record.float_layout(float_bits)
    return Part(record, decode_floats(floats, (rows, n // rows), bits).ravel(), symbols)


def value_of(part):
    """Return the tensor of a Part, float32; raises CompressionError beyond float32's range."""
    record, floats, symbols = part
    if record.kind == "float":
        return floats.reshape(record.shape)
    if record.kind == "levels":
        return floats[symbols]
    value = (symbols - record.zero).astype(np.float32)
    if record.kind == "masked":
        value[symbols == 1] = floats
    elif record.kind == "steps":
        with np.errstate(over="ignore"):
            value = (value.T * floats).T  # along the first axis
        if not np.isfinite(value).all():
            raise CompressionError(f"{record.name} must be finite, but its steps are too large")
    return value


def encode_floats(values, bits):
    """Return finite float32 values, (rows, columns), as bytes.

    bits: 32, exact; 16, rounded to float16; 7, rounded to an even grid from each row's minimum to
    its maximum: its least value and its step as float16, then 7 bits a value, the row filled up to
    a whole byte. Raises CompressionError if a value is beyond float16's range.
    """
    if bits == 32 or not values.size:
        return values.astype("<f4").tobytes()
    if bits == 16:
        return _float16(values).tobytes()
    values = values.astype(np.float64)
    # both rounded outwards, so that the grid reaches from end to end
    low = _float16(values.min(1, keepdims=True), -np.inf)
    highest = 2**bits - 1
    step = _float16((values.max(1, keepdims=True) - low) / highest, np.inf)
    codes = np.round((values - low) / np.where(step > 0, step, 1.0)).clip(0, highest)
    told = coders.to_bits(codes.astype(np.int64), bits).reshape(len(codes), -1)
    packed = np.packbits(told, axis=1)
    return np.hstack([low.view(np.uint8), step.view(np.uint8), packed]).tobytes()


def decode_floats(reader, shape, bits):
    """Return values of `shape`, (rows, columns), float32, taken off a ByteReader.

    Raises CompressionError if there are too few bytes or a value is NaN or infinite.
    """
    rows, columns = shape
    if bits < 16 and columns:
        width = 4 + math.ceil(columns * bits / 8)
        told = np.frombuffer(reader.take(rows * width), np.uint8).reshape(rows, width)
        low, step = np.split(told[:, :4].copy().view("<f2").astype(np.float32), 2, axis=1)
        codes = np.unpackbits(told[:, 4:], axis=1, count=columns * bits)
        codes = coders.from_bits(codes.reshape(rows, columns, bits))
        with np.errstate(invalid="ignore"):  # an infinite step; reported below
            values = low + step * codes.astype(np.float32)
    else:
        values = np.frombuffer(reader.take(rows * columns * bits // 8), f"<f{max(bits, 16) // 8}")
        values = values.astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise CompressionError(f"{reader.what} must be finite, got NaN or infinite values")
    return values


def _float16(values, towards=None):
    """Return values as float16, rounded to the nearest or `towards` inf or -inf."""
    largest, limit = np.abs(values).max(initial=0), np.finfo(np.float16).max
    if largest > limit:
        raise CompressionError(
            f"values must be at most {limit} with float_bits below 32, got {largest}")
    rounded = np.asarray(values).astype("<f2")
    if towards is None:
        return rounded
    beyond = (rounded.astype(np.float64) - values) * np.sign(towards) < 0
    return np.where(beyond, np.nextafter(rounded, np.float16(towards)), rounded)
