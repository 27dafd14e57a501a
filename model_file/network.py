"""The pruned and quantized ResNet as the bytes of a file, and back, and where every byte goes."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from arguments import check
from FP_layers import FP_Conv, FP_Linear, Learned
from model_file import coders, container
from model_file.coders import CompressionError
from model_file.container import Part, Record, along_channels
from resnet20 import ResNetCIFAR

__all__ = ["METHODS", "CompressionError", "compress", "compress_all", "decompress", "describe",
           "entropy_bound", "stored_shapes"]

METHODS = {  # name: (coder, float_bits); 32 bits give the net's logits exactly
    "float32": ("none", 32),
    "float16": ("none", 16),
    "fixed width": ("packed", 32),
    "bit mask": ("bitmask", 32),
    "Huffman": ("huffman", 32),
    "range": ("range", 32),
    "context": ("context", 32),
    "context, 8-bit floats": ("context", 8),
}


# ---------------------------------------------------------------- nets and tensors


def stored_shapes(net):
    """Return {name: shape} of what a file holds: parameters and, for BatchNorms, (2, channels)."""
    shapes = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            shapes[name] = (2, module.num_features)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            shapes |= {f"{name}.{key}": tuple(parameter.shape)
                       for key, parameter in module.named_parameters()}
    return shapes


def _scale_and_shift(norm):
    """Return (2, channels): what F.batch_norm multiplies with and adds, to the last bit."""
    x, zeros = torch.ones(1, norm.num_features, 1, 1), torch.zeros(norm.num_features)
    scale = F.batch_norm(x, zeros, norm.running_var, norm.weight, zeros, eps=norm.eps)
    shift = F.batch_norm(
        0 * x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    return torch.cat([scale, shift]).flatten(1)


def _set_scale_and_shift(norm, values):
    norm.weight.copy_(values[0])
    norm.bias.copy_(values[1])
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)  # so that 1 / sqrt(var + eps) is 1


def _values(net):
    """Return {name: array} of what a file holds, weights quantized, and {name: learned steps}."""
    values, steps = {}, {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            values[name] = _scale_and_shift(module)
        elif isinstance(module, (FP_Conv, FP_Linear)):
            child = next(name for name, _ in module.named_children())
            values[f"{name}.{child}.weight"] = module.quantized_weight()
            if getattr(module, child).bias is not None:
                values[f"{name}.{child}.bias"] = getattr(module, child).bias
            if isinstance(module.quantizer, Learned):
                steps[f"{name}.{child}.weight"] = module.quantizer.positive_step().flatten().numpy()
    return {name: value.contiguous().numpy() for name, value in values.items()}, steps


def _codes(value, step):
    """Return the integers that give `value`, exactly, times the steps, or None if none do."""
    codes = np.round(value / along_channels(step, value)).astype(np.int64)
    few = max(codes.max(), 0) - min(codes.min(), 0) < coders.MAX_LEVELS
    return (codes
            if few and np.array_equal(codes.astype(np.float32) * along_channels(step, value), value)
            else None)


def _drop_idle_scales(values):
    """Set to zero, in place, the BatchNorm scale of each channel whose weights are all zero.

    It scales nothing. Where training let the channel's variance vanish it is so large that the
    other scales, which are rounded to one grid with it, would be lost.
    """
    for name, weight in values.items():
        norm = name.removesuffix(".0.conv.weight") + ".1"
        if norm in values:
            values[norm][0, ~weight.reshape(len(weight), -1).any(1)] = 0


def _fold_steps(values, steps):
    """Move convolutions' steps into the BatchNorms behind them, in place: one float a channel less.

    scale * conv(step * codes, x) is (scale * step) * conv(codes, x), but for rounding.
    """
    for name, step in steps.items():
        norm, codes = name.removesuffix(".0.conv.weight") + ".1", _codes(values[name], step)
        if norm in values and codes is not None:
            values[name], steps[name] = codes.astype(np.float32), np.ones_like(step)
            values[norm] = values[norm] * np.stack([step, np.ones_like(step)])


def _part(name, value, step, coder, float_bits):
    """Return the Part of a tensor, with symbols where it has few values or many zeros."""
    plain = Part(Record(name, value.shape, "float"), value, None)
    if coder == "none" or not name.endswith(".weight"):
        return plain
    codes = None if step is None else _codes(value, step)
    if codes is not None:
        low, high, folded = (int(min(codes.min(), 0)),
                             int(max(codes.max(), 0)),
                             bool((step == 1).all()))
        record = Record(name, value.shape, "codes" if folded else "steps", high - low + 1, -low)
        return Part(record, step[:0] if folded else step, codes - low)
    levels, symbols = np.unique(value, return_inverse=True)
    if len(levels) <= min(coders.MAX_LEVELS, value.size / 8):  # each level costs a float
        record = Record(name, value.shape, "levels", len(levels), int(np.abs(levels).argmin()))
        return Part(record, levels, symbols.reshape(value.shape))
    mask = value != 0
    if (~mask).sum() * float_bits > value.size:  # the mask costs at most a bit a weight
        return Part(Record(name, value.shape, "masked", 2, 0), value[mask], mask.astype(np.int64))
    return plain


@torch.no_grad()
def _snapshot(net):
    """Return _values of a float32 copy of `net` on the CPU; raises as compress does."""
    if not isinstance(net, ResNetCIFAR):
        raise TypeError(f"net must be a ResNetCIFAR, got {type(net).__name__}")
    if net.num_layers > container.MAX_LAYERS:
        raise ValueError(
            f"net must have at most {container.MAX_LAYERS} layers, got {net.num_layers}"
        )
    _check_finite(net.state_dict())
    values, steps = _values(copy.deepcopy(net).cpu().float())
    _check_finite({name: torch.from_numpy(value) for name, value in values.items()})
    return values, steps


def _parts(snapshot, coder, float_bits):
    """Return the Parts of all that is stored of a net; raises as compress does."""
    check(container.CODERS, coder=coder)
    check(container.FLOAT_BITS, float_bits=float_bits)
    values, steps = ({name: array.copy() for name, array in arrays.items()} for arrays in snapshot)
    if float_bits < 32:
        _drop_idle_scales(values)
        _fold_steps(values, steps)
    return [
        _part(name, value, steps.get(name), coder, float_bits) for name, value in values.items()
    ]


def _check_finite(tensors):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CompressionError(f"net must be finite, but {name} holds NaN or infinite values")


# ---------------------------------------------------------------- files


def compress(net, coder="context", float_bits=32):
    """Return `net`, a ResNetCIFAR on any device, as the bytes of a file (see container.py).

    coder: how weights of few values become bytes, a key of coders.CODERS, or "none": as floats like
    the rest. float_bits: of all other values. 32 keeps them, and with them the logits in evaluation
    on a CPU, bit for bit; 16 or 8 to 4 (see container.encode_floats) round them, and move learned
    steps into BatchNorm. What that costs in accuracy has to be measured.

    Raises TypeError or ValueError for arguments out of range, and CompressionError if the net holds
    NaN or infinite values, or ones too large for fewer than 32 bits.
    """
    parts = _parts(_snapshot(net), coder, float_bits)
    return container.write(net.num_layers, coder, float_bits, parts)


def decompress(data):
    """Return the net in the bytes `data` of a file: a float ResNetCIFAR on the CPU, in eval mode.

    Its weights are the quantized ones, and its BatchNorms hold scale and shift with neutral
    statistics: it is meant for evaluation. Raises CompressionError for what compress does not
    write, in time and memory bounded by a net of container.MAX_LAYERS layers, whatever `data`
    holds.
    """
    num_layers, _, _, _, parts = container.read(bytes(data), _expected)
    net = ResNetCIFAR(num_layers).eval()
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    with torch.no_grad():
        for part in parts:
            name, value = part.record.name, torch.from_numpy(container.value_of(part))
            if name in parameters:
                parameters[name].copy_(value)
            else:
                _set_scale_and_shift(modules[name], value)
    return net


def _expected(num_layers):
    with torch.device("meta"):  # shapes only
        return stored_shapes(ResNetCIFAR(num_layers))


# ---------------------------------------------------------------- where the bytes go


def compress_all(net):
    """Return {method: the bytes of a file} for each of METHODS; raises as compress does."""
    snapshot = _snapshot(net)
    return {method: container.write(
                net.num_layers, coder, float_bits, _parts(snapshot, coder, float_bits)
            )
            for method, (coder, float_bits) in METHODS.items()}


def entropy_bound(net):
    """Return the bytes of a file without header whose symbols take exactly their entropy.

    The floats count with 32 bits. A bound on "Huffman" and "range"; "context" can be smaller, as it
    does not take weights for independent.
    """
    parts = _parts(_snapshot(net), "range", 32)
    coded = [(part.symbols, part.record.alphabet) for part in parts if part.symbols is not None]
    symbols = coders.entropy_bytes(*zip(*coded)) if coded else 0
    return math.ceil(symbols) + sum(len(container.float_bytes(part, 32)) for part in parts)


def describe(data):
    """Return where the bytes of a file are, by section and by tensor.

    {section: bytes} and [(record, fraction of zeros, bytes of floats, bytes of symbols)]. Sections
    add up to the file; the tensors' bytes to the sections "floats" and "symbols". A
    tensor's symbols count as what the coder writes more for it than for those before it. Raises as
    decompress does.
    """
    _, coder, float_bits, sections, parts = container.read(bytes(data), _expected)
    rows, so_far = [], 0
    for i, part in enumerate(parts):
        before = so_far
        if part.symbols is not None:
            so_far = len(container.symbol_bytes(parts[:i + 1], coder))
        zeros = float((container.value_of(part) == 0).mean())
        rows.append(
            (part.record, zeros, len(container.float_bytes(part, float_bits)), so_far - before)
        )
    return sections, rows
