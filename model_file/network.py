"""The pruned and quantized ResNet as the bytes of a file, and back, and where every byte goes."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from arguments import check
from FP_layers import FP_Conv, FP_Linear, Learned
from model_file import coders, container
from model_file.coders import CompressionError
from model_file.container import Part, Record
from resnet20 import ResNetCIFAR


def stored_shapes(net):
    """Return {name: shape} of what a file holds: parameters and, for BatchNorms, (2, channels)."""
    shapes = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            shapes[name] = (2, module.num_features)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            shapes |= {f"{name}.{key}": tuple(p.shape) for key, p in module.named_parameters()}
    return shapes


def _expected(num_layers):
    with torch.device("meta"):  # shapes only
        return stored_shapes(ResNetCIFAR(num_layers))


def _scale_and_shift(norm):
    """Return (2, channels): what F.batch_norm multiplies with and adds, to the last bit."""
    zeros, ones = torch.zeros(norm.num_features), torch.ones(1, norm.num_features, 1, 1)
    scale = F.batch_norm(ones, zeros, norm.running_var, norm.weight, zeros, eps=norm.eps)
    return torch.cat([scale, norm.eval()(0 * ones)]).flatten(1)


def _values(net):
    """Return {name: array} of what a file holds, weights quantized, and {name: learned steps}."""
    values, steps = {}, {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            values[name] = _scale_and_shift(module)
        elif isinstance(module, (FP_Conv, FP_Linear)):
            child, layer = next(module.named_children())
            values[f"{name}.{child}.weight"] = module.quantized_weight()
            if layer.bias is not None:
                values[f"{name}.{child}.bias"] = layer.bias
            if isinstance(module.quantizer, Learned):
                steps[f"{name}.{child}.weight"] = module.quantizer.positive_step().flatten().numpy()
    return {name: value.contiguous().numpy() for name, value in values.items()}, steps


def _codes(value, step):
    """Return the integers that give `value`, exactly, times the steps, or None if none do."""
    codes = np.round((value.T / step).T).astype(np.int64)  # along the first axis
    few = max(codes.max(), 0) - min(codes.min(), 0) < coders.MAX_LEVELS
    exact = few and np.array_equal((codes.astype(np.float32).T * step).T, value)
    return codes if exact else None


def _drop_idle_scales(values):
    """Set to zero, in place, the BatchNorm scale of each channel whose weights are all zero.

    Where the channel's variance has vanished it is so large that others on its grid would be lost.
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
        low, folded = int(min(codes.min(), 0)), bool((step == 1).all())
        n_levels = int(max(codes.max(), 0)) - low + 1
        record = Record(name, value.shape, "codes" if folded else "steps", n_levels, -low)
        return Part(record, step[:0] if folded else step, codes - low)
    levels, symbols = np.unique(value, return_inverse=True)
    if len(levels) <= min(coders.MAX_LEVELS, value.size / 8):  # each level costs a float
        record = Record(name, value.shape, "levels", len(levels), int(np.abs(levels).argmin()))
        return Part(record, levels, symbols.reshape(value.shape))
    mask = value != 0
    pays = (~mask).sum() * float_bits > value.size  # the mask costs at most a bit a weight
    masked = Part(Record(name, value.shape, "masked", 2, 0), value[mask], mask.astype(np.int64))
    return masked if pays else plain


@torch.no_grad()
def parts_of(net, coder="context", float_bits=32):
    """Return the container.Parts that a file holds of a net; raises as compress does."""
    check(container.CODERS, coder=coder)
    check(container.FLOAT_BITS, float_bits=float_bits)
    if not isinstance(net, ResNetCIFAR):
        raise TypeError(f"net must be a ResNetCIFAR, got {type(net).__name__}")
    check(container.DEPTHS, num_layers=net.num_layers)
    if net.width != 16:
        raise ValueError(f"net must have a width of 16 channels for this format, got {net.width}")
    _check_finite(net.state_dict())
    values, steps = _values(copy.deepcopy(net).cpu().float())
    _check_finite({name: torch.from_numpy(value) for name, value in values.items()})
    if float_bits < 32:
        _drop_idle_scales(values)
        _fold_steps(values, steps)
    return [_part(n, value, steps.get(n), coder, float_bits) for n, value in values.items()]


def _check_finite(tensors):
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CompressionError(f"net must be finite, but {name} holds NaN or infinite values")


def compress(net, coder="context", float_bits=32):
    """Return `net`, a ResNetCIFAR of width 16, as the bytes of a file (see container.py).

    coder: of weights with few values, a key of coders.CODERS, or "none": as floats like the rest.
    float_bits: of all other values. 32 keeps them, and with them the logits in evaluation on a CPU,
    bit for bit; 16 or 7 rounds them (see container.encode_floats), and moves learned steps into
    BatchNorm. What that costs in accuracy has to be measured.

    Raises TypeError or ValueError for arguments out of range, and CompressionError if the net holds
    NaN or infinite values, or ones too large for fewer than 32 bits.
    """
    parts = parts_of(net, coder, float_bits)
    return container.write(net.num_layers, coder, float_bits, parts)


@torch.no_grad()
def decompress(data):
    """Return the net in the bytes `data` of a file: a float ResNetCIFAR on the CPU, in eval mode.

    Its weights are the quantized ones, and its BatchNorms hold scale and shift with neutral
    statistics: it is meant for evaluation. Raises CompressionError for bytes that are damaged or of
    another format, in time and memory bounded by those of the deepest net, whatever `data` holds.
    """
    num_layers, _, _, _, parts = container.read(bytes(data), _expected)
    net = ResNetCIFAR(num_layers).eval()
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    for part in parts:
        name, value = part.record.name, torch.from_numpy(container.value_of(part))
        if name in parameters:
            parameters[name].copy_(value)
        else:
            norm = modules[name]
            norm.weight.copy_(value[0])
            norm.bias.copy_(value[1])
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)  # so that 1 / sqrt(var + eps) is 1
    return net


def describe(data):
    """Return where the bytes of a file are: {section: bytes}, and a row for each tensor.

    A row: (record, fraction of zeros, bytes of floats, bytes of symbols), the last what the coder
    writes more for it than for those before it. Raises as decompress does.
    """
    _, coder, float_bits, sections, parts = container.read(bytes(data), _expected)
    rows, before = [], 0
    for i, part in enumerate(parts, start=1):
        floats = len(container.float_bytes(part, float_bits))
        so_far = before if part.symbols is None else len(container.symbol_bytes(parts[:i], coder))
        zeros = float((container.value_of(part) == 0).mean())
        rows.append((part.record, zeros, floats, so_far - before))
        before = so_far
    return sections, rows
