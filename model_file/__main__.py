"""Command line: `pack` a checkpoint into a small file, `unpack` it, `info` on it, `export` one."""

import argparse
import math
import sys
from pathlib import Path

from experiments.run import QUANTIZERS, load_checkpoint
from files import atomic_write, check_writable
from model_file import container
from model_file.network import compress, decompress, describe, stored_shapes
from train_utils import get_data
from training.checkpoints import save_weights


def main(arguments=None):
    """Run a command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command != "info":
            _refuse_existing(options.out)
        if options.command == "pack":
            net = _net_of(options)
            data = compress(net, options.coder, options.float_bits)
            with atomic_write(options.out) as file:
                file.write(data)
            print(f"{options.out}: {_ratio(data, stored_shapes(net).values())}")
        elif options.command == "unpack":
            save_weights(decompress(Path(options.file).read_bytes()), options.out)
        elif options.command == "export":
            _export(_net_of(options), options.out, options.int8)
        else:
            _print_info(Path(options.file).read_bytes())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _net_of(options):
    return load_checkpoint(options.checkpoint, options.bits, options.symmetric, options.quantizer)


def _refuse_existing(out):
    if Path(out).exists():
        raise FileExistsError(f"{out} is there already: remove it, or choose another name")


def _export(net, out, int8):
    from model_file.export import calibration_images, export_onnx, quantize_int8

    check_writable(out)
    model = export_onnx(net)
    if int8:
        model = quantize_int8(model, calibration_images(get_data("cpu")))
    with atomic_write(out) as file:
        file.write(model)
    print(f"{out}: {_ratio(model, stored_shapes(net).values())}")


def _parser():
    parser = argparse.ArgumentParser(prog="python -m model_file", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write a checkpoint as a file")
    pack.add_argument("--coder", choices=container.CODERS, default="context")
    pack.add_argument("--float-bits", type=int, choices=container.FLOAT_BITS, default=32,
                      help="of values that are no symbols; fewer than 32 round them")
    export = commands.add_parser("export", help="write a checkpoint as an ONNX file")
    export.add_argument("--int8", action="store_true", help="compute in 8-bit integers")
    for command, out in ((pack, "OUT"), (export, "OUT.onnx")):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's name, or a .pt file")
        command.add_argument("out", metavar=out)
        command.add_argument("--bits", type=int, metavar="N",
                             help="bits of a weight (default: the run's)")
        command.add_argument("--quantizer", choices=QUANTIZERS, help="how --bits quantizes: "
                             "minmax, as assigned (default), or learned, with steps in the file")
        command.add_argument("--symmetric", action="store_true", help="--bits: levels around zero")
    unpack = commands.add_parser("unpack", help="write a file's net as a float checkpoint")
    info = commands.add_parser("info", help="show where every byte goes")
    for command in (unpack, info):
        command.add_argument("file", metavar="FILE")
    unpack.add_argument("out", metavar="OUT.pt")
    return parser


def _ratio(data, shapes):
    floats = 4 * sum(map(math.prod, shapes))
    return (f"{len(data):,} bytes, {floats / len(data):.2f} times smaller than "
            f"{floats:,} bytes of float32 parameters")


def _print_info(data):
    sections, rows = describe(data)
    line = "{:33} {:>10} {:>6} {:>6} {:>9} {:>6} {:>7} {:>10}"
    print(line.format("tensor", "shape", "kind", "levels", "zeros (%)", "floats", "symbols",
                      "bits/value"))
    for record, zeros, floats, symbols in rows:
        bits = 8 * (floats + symbols) / math.prod(record.shape)
        print(line.format(record.name, "x".join(map(str, record.shape)), record.kind,
                          record.n_levels or "", f"{100 * zeros:.2f}", floats, symbols,
                          f"{bits:.3f}"))
    total = " + ".join(f"{name} {n:,}" for name, n in sections.items())
    print(f"{total} = {_ratio(data, [record.shape for record, *_ in rows])}")


if __name__ == "__main__":
    sys.exit(main())
