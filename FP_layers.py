"""Fixed-point (quantized-weight) layers: two quantizers, and the layers built on them."""

import math
import operator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# Notebooks for the course's skeleton rely on `from FP_layers import *` for what follows fit_step.
__all__ = ["STE", "LearnedStep", "MinMax", "Learned", "FP_Conv", "FP_Linear", "check_n_bits",
           "code_range", "fit_step", "torch", "nn", "F", "math", "np", "device"]

MAX_BITS = 16  # far below the 24 of float32, so that neighbouring levels differ


def __getattr__(name):
    """Resolve `device` when it is asked for, so that importing this module never touches a GPU."""
    if name == "device":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_n_bits(Nbits, symmetric=False):
    """Return Nbits as None or a plain int, or raise if no quantizer of that width exists.

    Allowed: None (float weights), 0 (all weights zero), 1 to 16; with symmetric=True not 1, as a
    symmetric 1-bit grid has no level beside zero. Raises TypeError if Nbits is no integer or
    symmetric no bool, ValueError if Nbits is out of range.
    """
    if not isinstance(symmetric, (bool, np.bool_)):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    if Nbits is None:
        return None
    try:
        if isinstance(Nbits, (bool, np.bool_)):
            raise TypeError
        n_bits = operator.index(Nbits)
    except TypeError:
        allowed = f"None or an integer from 0 to {MAX_BITS}"
        raise TypeError(f"Nbits must be {allowed}, got {Nbits!r}") from None
    if not 0 <= n_bits <= MAX_BITS:
        raise ValueError(f"Nbits must be None, 0 or 1 to {MAX_BITS}, got {n_bits}")
    if symmetric and n_bits == 1:
        raise ValueError(f"Nbits must be None, 0 or 2 to {MAX_BITS} when symmetric=True, got 1")
    return n_bits


class STE(torch.autograd.Function):
    """Quantize w to 2^bit levels, 2^bit - 1 if symmetric; pass the gradient straight through.

    STE.apply(w, bit, symmetric) keeps shape and dtype; bit=None: w as it is. Raises as check_n_bits
    does, TypeError for integers and, on a CPU, ValueError for what is not finite.
    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """

    @staticmethod
    def forward(ctx, w, bit, symmetric=False):
        bit, x = check_n_bits(bit, symmetric), _as_float32(w)
        if bit is None or bit == 0 or w.numel() == 0:
            return w.view_as(w) if bit is None else torch.zeros_like(w)
        if symmetric:  # equal steps on each side of zero, up to max|w|
            alpha, beta, steps = x.abs().max(), 0.0, 2 ** (bit - 1) - 1
        else:  # equal steps from min(w) to max(w)
            alpha, beta, steps = x.max() - x.min(), x.min(), 2**bit - 1
        _check_finite(alpha, x)
        ws = (x - beta) / torch.where(alpha > 0, alpha, 1.0)  # in [0, 1]; symmetric: [-1, 1]
        wq = torch.round(ws * steps) / steps * alpha + beta
        return torch.where(x == 0, 0.0, wq).to(w.dtype)  # a pruned weight stays exactly zero

    @staticmethod
    def backward(ctx, g):
        return g, None, None


def _as_float32(w):
    """Return w, or w as float32 if it is narrower. Raises TypeError unless it is floating-point."""
    if not w.is_floating_point():
        raise TypeError(f"w must be a floating-point tensor, got dtype {w.dtype}")
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def _check_finite(alpha, x):
    """Raise ValueError if the range `alpha` of x is NaN or infinite.

    Only on a CPU and not inside torch.compile: a GPU would be waited for in each layer and step.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(alpha):
        raise ValueError("w must be finite with a finite range, "
                         f"got min {x.min()} and max {x.max()}")


class MinMax:
    """The assigned quantizer: STE with `Nbits` bits.

    Nbits: None, 0 or 1 to 16; symmetric: levels symmetric around zero, from 2 bits on. A pruned
    weight may be one value more than the grid has. Raises as check_n_bits does.
    """

    def __init__(self, Nbits, symmetric=False):
        self.Nbits, self.symmetric = check_n_bits(Nbits, symmetric), bool(symmetric)

    def __call__(self, w):
        """Return the quantized weights, of w's shape, dtype and device."""
        return STE.apply(w, self.Nbits, self.symmetric)

    def fit(self, w):
        """Nothing is kept between calls, so nothing has to be fitted."""


def code_range(Nbits, symmetric=False):
    """Return (lowest, highest), the integer codes of LearnedStep; zero is always among them.

    Two's complement, -2^(Nbits-1) to 2^(Nbits-1) - 1. With symmetric=True as far down as up, so
    that 2 bits are the ternary codes -1, 0, 1. Raises as check_n_bits does, and ValueError if Nbits
    is None or below 2.
    """
    n_bits = check_n_bits(Nbits, symmetric)
    if n_bits is None or n_bits < 2:
        raise ValueError(f"Nbits must be 2 to {MAX_BITS} for a learned step, got {Nbits}")
    highest = 2 ** (n_bits - 1) - 1
    return (-highest if symmetric else -highest - 1), highest


class LearnedStep(torch.autograd.Function):
    """Quantize to integer multiples of a step that is itself trained, with a level at zero.

    LearnedStep.apply(w, step, lowest, highest) returns clamp(round(w / step), lowest, highest) *
    step, of w's shape. step must be positive and broadcast against w, one for each output channel:
    (C, 1, 1, 1) for a convolution's (C, ...). A weight that is zero stays exactly zero.

    With v = w / step, dL/dw passes where lowest <= v <= highest and is zero elsewhere. dQ/dstep is
    round(v) - v inside and the clamped code outside, summed over the weights that share the step
    and divided by sqrt(their number * highest), to have the size of the weights' gradients.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.
    """

    @staticmethod
    def forward(ctx, w, step, lowest, highest):
        v = w / step
        codes = v.round().clamp(lowest, highest)
        ctx.save_for_backward(v, codes, step)
        ctx.limits = lowest, highest
        return codes * step

    @staticmethod
    def backward(ctx, g):
        v, codes, step = ctx.saved_tensors
        lowest, highest = ctx.limits
        inside = (v >= lowest) & (v <= highest)
        slope = torch.where(inside, codes - v, codes)
        shared_by = v.numel() / step.numel()
        step_gradient = (g * slope).sum_to_size(step.shape) / math.sqrt(shared_by * highest)
        return g * inside, step_gradient, None, None


@torch.no_grad()
def fit_step(w, lowest, highest):
    """Return the step of each output channel of w, (C, 1, ..., 1), of least squared error.

    w: (C, ...), finite. A search over 100 steps up to max|w| / highest, then over as many around
    the best of them. Each candidate is first improved by the closed form
    <w, codes> / <codes, codes> for its codes. A channel of zeros gets step 1.
    """
    rows = w.flatten(1)
    largest = rows.abs().amax(1, keepdim=True) / highest
    largest = torch.where(largest > 0, largest, 1.0)
    best, error = largest, torch.full_like(largest, math.inf)

    def codes_of(step):
        return (rows / step).round().clamp(lowest, highest)

    center = radius = largest / 2
    for _ in range(2):
        for i in range(1, 101):
            step = center + radius * (i / 50 - 1)
            step = torch.where(step > 0, step, center)
            codes = codes_of(step)
            norm = codes.square().sum(1, keepdim=True)
            step = torch.where(norm > 0, (rows * codes).sum(1, keepdim=True) / norm, step)
            error_i = (rows - codes_of(step) * step).square().sum(1, keepdim=True)
            best, error = torch.where(error_i < error, step, best), torch.minimum(error_i, error)
        center, radius = best, largest / 100
    silent = (rows == 0).all(1, keepdim=True)
    return torch.where(silent, 1.0, best).view(-1, *[1] * (w.dim() - 1))


class Learned(nn.Module):
    """A quantizer with one trained step for each output channel, parameter `step`; see LearnedStep.

    Nbits: 2 to 16; symmetric: as many codes below zero as above. `fit` must have seen the weight
    before the first call. Raises as code_range does.
    """

    def __init__(self, Nbits, symmetric=False):
        super().__init__()
        self.limits = code_range(Nbits, symmetric)
        self.Nbits, self.symmetric = check_n_bits(Nbits), bool(symmetric)
        self.step = None

    def forward(self, w):
        return LearnedStep.apply(w, self.positive_step(), *self.limits)

    def positive_step(self):
        """Return the step of each output channel, (C, 1, ..., 1): |step|, which keeps its sign."""
        return self.step.abs().clamp_min(torch.finfo(self.step.dtype).tiny)

    def fit(self, w):
        """Set the steps, in place, to those of least squared error for w, (C, ...)."""
        step = fit_step(w, *self.limits)
        if self.step is None:
            self.step = nn.Parameter(step)
        else:
            self.step.data.copy_(step)


class _FixedPoint(nn.Module):
    """How the weight of a layer's child becomes what FP_Conv or FP_Linear compute with."""

    def __init__(self, child, layer, Nbits, symmetric, quantizer):
        super().__init__()
        if not isinstance(quantizer, type):
            raise TypeError(f"quantizer must be MinMax, Learned or a class, got {quantizer!r}")
        self.add_module(child, layer)
        self._kind, self._symmetric = quantizer, symmetric
        self.Nbits = Nbits

    @property
    def weight(self):
        """The float weight behind the quantized one, the child's parameter."""
        return next(self.children()).weight

    @property
    def Nbits(self):
        """Bits of a weight, None for float; to set it makes a quantizer fitted to the weight."""
        return None if self.quantizer is None else self.quantizer.Nbits

    @Nbits.setter
    def Nbits(self, Nbits):
        quantizer = None
        if check_n_bits(Nbits, self._symmetric) is not None:
            quantizer = self._kind(Nbits, self._symmetric)
            quantizer.fit(self.weight)
        self.quantizer = quantizer

    def forward(self, x):
        layer = next(self.children())
        if self.quantizer is None:
            return layer(x)  # with whatever hooks it has
        for hook in layer._forward_pre_hooks.values():  # torch.nn.utils.prune makes weights there
            hook(layer, (x,))
        return self._compute(x, self.quantizer(layer.weight))

    def quantized_weight(self):
        """Return the weight that forward computes with, of the float weight's shape."""
        return self.weight if self.quantizer is None else self.quantizer(self.weight)

    def fit_quantizer(self):
        """Fit what the quantizer has learned, such as steps, to the weight as it is, in place."""
        if self.quantizer is not None:
            self.quantizer.fit(self.weight)

    def extra_repr(self):
        return f"Nbits={self.Nbits}, symmetric={self._symmetric}, quantizer={self._kind.__name__}"


class FP_Linear(_FixedPoint):
    """A fully connected layer (child `linear`, an nn.Linear with bias) whose weight is quantized.

    Maps (..., in_features) to (..., out_features); the bias stays float. Nbits: None, exactly
    nn.Linear, or as the quantizer has it. quantizer: MinMax, the assigned one, or Learned, whose
    `step` is (out_features, 1). Raises as the quantizer does, already at construction.
    """

    def __init__(self, in_features, out_features, Nbits=None, symmetric=False, quantizer=MinMax):
        linear = nn.Linear(in_features, out_features)
        super().__init__("linear", linear, Nbits, symmetric, quantizer)

    def _compute(self, x, weight):
        return F.linear(x, weight, self.linear.bias)


class FP_Conv(_FixedPoint):
    """A 2D convolution (child `conv`, an nn.Conv2d) whose weight is quantized.

    Maps (N, in_channels, H, W) to (N, out_channels, H', W'); a bias stays float. Nbits: None,
    exactly nn.Conv2d, or as the quantizer has it. quantizer: MinMax, the assigned one, or Learned,
    whose `step` is (out_channels, 1, 1, 1). Raises as the quantizer does, already at construction.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False,
                 Nbits=None, symmetric=False, quantizer=MinMax):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        super().__init__("conv", conv, Nbits, symmetric, quantizer)

    def _compute(self, x, weight):
        return F.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)
