"""A network's symbols by NNCodec, the reference codec of ISO/IEC 15938-17, and by our coder.

    pip install --no-deps nncodec==2.1.3 pandas opencv-python-headless h5py
    python -m benchmarks.codec     writes codec.json, which going_further.ipynb shows

NNCodec is compiled when it is installed, and nothing else here needs it.
"""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.sizes import AS_FILE
from experiments.run import load_checkpoint
from files import write_json
from model_file.container import symbol_bytes
from model_file.network import parts_of

RESULTS = Path(__file__).with_name("codec.json")


def coded_parts():
    """Return the parts with symbols of the network shipped as a file; see model_file.network."""
    return [part for part in parts_of(load_checkpoint(AS_FILE)) if part.symbols is not None]


def main():
    """Code the symbols losslessly by NNCodec's DeepCABAC, as it is set by default; return 0.

    Raises RuntimeError if they do not come back.
    """
    from nncodec import nnc

    parts = coded_parts()
    codes = {str(i): part.symbols.astype(np.int32) - part.record.zero
             for i, part in enumerate(parts)}  # its file holds the names, so they are short
    with tempfile.NamedTemporaryFile() as file:
        coded = nnc.compress(dict(codes), bitstream_path=file.name, return_bitstream=True)
    decoded = nnc.decompress(coded)
    if not all(np.array_equal(decoded[name], array) for name, array in codes.items()):
        raise RuntimeError("NNCodec must give the symbols back")
    results = {"run": AS_FILE, "NNCodec": importlib.metadata.version("nncodec"),
               "bytes": len(coded), "ours": len(symbol_bytes(parts, "context"))}
    write_json(RESULTS, results)
    print(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
