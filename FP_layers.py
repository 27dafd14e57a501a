"""Fixed-point (quantized-weight) layers: three straight-through quantizers, and the layers built on them."""

import math  # noqa: F401  (math, np and F are re-exported, see __all__)
import operator

import numpy as np  # noqa: F401
import torch
import torch.nn as nn
import torch.nn.functional as F

# Notebooks written against the course's skeleton rely on `from FP_layers import *` for these names too.
__all__ = ["STE", "LearnedStep", "TernaryLevels", "FP_Conv", "FP_Linear", "check_n_bits", "code_range", "fit_step",
           "fit_levels", "torch", "nn", "F", "math", "np", "device"]

MAX_BITS = 16  # beyond this, neighbouring levels are no longer told apart reliably in float32 arithmetic


def __getattr__(name):
    """Resolve `device` when it is asked for, so that importing this module never touches a GPU."""
    if name == "device":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_n_bits(Nbits, symmetric=False):
    """Return Nbits as None or a plain int, or raise if no quantizer of that width exists.

    Allowed: None (float weights), 0 (all weights zero), 1 to 16; with symmetric=True 1 is not allowed,
    because a symmetric 1-bit grid has no level beside zero.

    Raises TypeError if Nbits is no integer or symmetric no bool, ValueError if Nbits is out of range.
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
        raise TypeError(f"Nbits must be None or an integer from 0 to {MAX_BITS}, got {Nbits!r}") from None
    if not 0 <= n_bits <= MAX_BITS:
        raise ValueError(f"Nbits must be None, 0 or 1 to {MAX_BITS}, got {n_bits}")
    if symmetric and n_bits == 1:
        raise ValueError(f"Nbits must be None, 0 or 2 to {MAX_BITS} when symmetric=True, got 1")
    return n_bits


class STE(torch.autograd.Function):
    """Quantize forward, pass the gradient straight through backward.

    STE.apply(w, bit, symmetric=False) returns a tensor of w's shape, dtype and device:

    - bit=None: w itself; bit=0: zeros.
    - asymmetric: 2^bit equidistant levels from min(w) to max(w).
    - symmetric: 2^(bit-1) - 1 equidistant steps on each side of zero, up to max|w|.

    A weight that is exactly zero counts as pruned and stays exactly zero, on the grid or not, so a
    pruned tensor can hold one value more than the grid. A constant tensor is returned unchanged.
    Arithmetic is done in float32 for narrower dtypes. The gradient is the identity: dL/dw = dL/dQ(w).

    Raises TypeError if w is not a floating-point tensor or bit is no integer; ValueError for another
    bit, or if w has a NaN or infinite element or a range too large for its dtype (checked on the CPU, and not
    inside torch.compile; elsewhere NaN reaches the loss instead).

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
    """

    @staticmethod
    def forward(ctx, w, bit, symmetric=False):
        bit = check_n_bits(bit, symmetric)
        if not w.is_floating_point():
            raise TypeError(f"w must be a floating-point tensor, got dtype {w.dtype}")
        if bit is None:
            return w.view_as(w)
        if bit == 0 or w.numel() == 0:
            return torch.zeros_like(w)

        x = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
        if symmetric:
            alpha = x.abs().max()
            beta = torch.zeros_like(alpha)
            step = 2 ** (bit - 1) - 1
        else:
            beta = x.min()
            alpha = x.max() - beta
            step = 2**bit - 1
        # On a GPU, to read the answer would be to wait for it, in each layer and step.
        if w.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(alpha):
            raise ValueError(f"w must be finite with a finite range, got min {x.min()} and max {x.max()}")

        divisor = torch.where(alpha > 0, alpha, torch.ones_like(alpha))  # a constant w: 0 / 1, not 0 / 0
        ws = (x - beta) / divisor  # in [0, 1], symmetric in [-1, 1]
        wq = torch.round(ws * step) / step * alpha + beta
        return torch.where(x == 0, torch.zeros_like(wq), wq).to(w.dtype)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


# ---------------------------------------------------------------- a step that is learned


QUANTIZERS = ("minmax", "learned", "ternary")


def code_range(Nbits, symmetric=False):
    """Return (lowest, highest), the integer codes of LearnedStep; zero is always among them.

    Two's complement, -2^(Nbits-1) to 2^(Nbits-1) - 1; with symmetric=True as far down as up, so that 2 bits
    are the ternary codes -1, 0, 1. Raises as check_n_bits does, and ValueError if Nbits is None or below 2.
    """
    n_bits = check_n_bits(Nbits, symmetric)
    if n_bits is None or n_bits < 2:
        raise ValueError(f"Nbits must be 2 to {MAX_BITS} for a learned step, got {Nbits}")
    highest = 2 ** (n_bits - 1) - 1
    return (-highest if symmetric else -highest - 1), highest


class LearnedStep(torch.autograd.Function):
    """Quantize to integer multiples of a step that is itself trained, with a level at zero.

    LearnedStep.apply(w, step, lowest, highest) returns clamp(round(w / step), lowest, highest) * step, of w's
    shape. step must be positive and broadcast against w, one for each output channel: (C, 1, 1, 1) for a
    convolution's (C, ...). A weight that is zero stays exactly zero.

    Gradients, with v = w / step: dL/dw passes where lowest <= v <= highest and is zero elsewhere; dQ/dstep is
    round(v) - v inside and the clamped code outside, summed over the weights that share the step and divided
    by sqrt(their number * highest), which brings its size near that of the weights' gradients.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 3 and section 2.2.
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
def fit_step(w, lowest, highest, candidates=100):
    """Return the step of each output channel of w, (C, 1, ..., 1), that quantizes it with least squared error.

    w: (C, ...), finite. A search over `candidates` steps up to max|w| / highest, then over as many around the best
    of them; each candidate is first improved by the closed form <w, codes> / <codes, codes> for its codes. A
    channel of zeros gets step 1.
    """
    rows = w.flatten(1)
    largest = rows.abs().amax(1, keepdim=True) / highest
    largest = torch.where(largest > 0, largest, 1.0)
    best, error = largest, torch.full_like(largest, math.inf)

    def codes_of(step):
        return (rows / step).round().clamp(lowest, highest)

    center = radius = largest / 2
    for _ in range(2):
        for i in range(1, candidates + 1):
            step = center + radius * (2 * i / candidates - 1)
            step = torch.where(step > 0, step, center)
            codes = codes_of(step)
            norm = codes.square().sum(1, keepdim=True)
            step = torch.where(norm > 0, (rows * codes).sum(1, keepdim=True) / norm, step)
            error_i = (rows - codes_of(step) * step).square().sum(1, keepdim=True)
            best, error = torch.where(error_i < error, step, best), torch.minimum(error_i, error)
        center, radius = best, largest / candidates
    silent = (rows == 0).all(1, keepdim=True)
    return torch.where(silent, 1.0, best).view(-1, *[1] * (w.dim() - 1))


# ---------------------------------------------------------------- three levels that are learned


def ternary_signs(w, threshold=0.05):
    """Return the signs of w, of its shape, with 0 for weights up to `threshold` times max|w| in size."""
    return torch.where(w.abs() > threshold * w.abs().max(), w.sign(), 0)


class TernaryLevels(torch.autograd.Function):
    """Quantize to -n, 0 and p, where n and p are trained, for a whole tensor.

    TernaryLevels.apply(w, levels), levels = (n, p), both positive, returns a tensor of w's shape: zero where
    ternary_signs(w) is, else -n or p. dL/dw passes straight through; dL/dn and dL/dp are the sums over the weights
    at that level, divided by the square root of the number of all weights as LearnedStep's are.

    Source: Zhu et al., "Trained Ternary Quantization", ICLR 2017, equations 6 and 7, with their threshold; they
    also scale dL/dw by the level.
    """

    @staticmethod
    def forward(ctx, w, levels):
        signs = ternary_signs(w)
        ctx.save_for_backward(signs)
        return signs.clamp(max=0) * levels[0] + signs.clamp(min=0) * levels[1]

    @staticmethod
    def backward(ctx, g):
        signs, = ctx.saved_tensors
        sums = torch.stack([-(g * (signs < 0)).sum(), (g * (signs > 0)).sum()])
        return g, sums / math.sqrt(signs.numel())


@torch.no_grad()
def fit_levels(w):
    """Return (n, p), the mean size of the weights in w that TernaryLevels makes -n and p; 1 where there are none."""
    signs = ternary_signs(w)
    groups = (-w[signs < 0], w[signs > 0])
    return torch.stack([group.mean() if len(group) else w.new_ones(()) for group in groups])


# ---------------------------------------------------------------- layers


class _FixedPoint(nn.Module):
    """What FP_Conv and FP_Linear share: how the weight of their one child becomes the weight they compute with."""

    def __init__(self, Nbits, symmetric, quantizer):
        super().__init__()
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
        self.Nbits = check_n_bits(Nbits, symmetric)
        if quantizer == "ternary" and self.Nbits not in (None, 2):
            raise ValueError(f"Nbits must be None or 2 for ternary levels, got {Nbits}")
        self.symmetric = bool(symmetric)
        self.quantizer = quantizer

    @property
    def weight(self):
        """The float weight behind the quantized one, the child's parameter."""
        return next(self.children()).weight

    def quantized_weight(self):
        """Return the weight that forward computes with, of the float weight's shape."""
        if self.Nbits is None or self.quantizer == "minmax":
            return STE.apply(self.weight, self.Nbits, self.symmetric)
        if self.quantizer == "ternary":
            return TernaryLevels.apply(self.weight, _positive(self.levels))
        return LearnedStep.apply(self.weight, self.positive_step(), *code_range(self.Nbits, self.symmetric))

    def positive_step(self):
        """Return the learned step of each output channel, (C, 1, ..., 1): |step|, so that training cannot flip it."""
        return _positive(self.step)

    def reset_step(self):
        """Fit what is learned, step or levels, to the weight as it is, in place; else do nothing."""
        if self.Nbits is None or self.quantizer == "minmax":
            return
        if self.quantizer == "ternary":
            name, value = "levels", fit_levels(self.weight)
        else:
            name, value = "step", fit_step(self.weight, *code_range(self.Nbits, self.symmetric))
        if not hasattr(self, name):
            setattr(self, name, nn.Parameter(value))
        else:
            getattr(self, name).data.copy_(value)

    def extra_repr(self):
        return f"Nbits={self.Nbits}, symmetric={self.symmetric}, quantizer={self.quantizer}"


def _positive(x):
    return x.abs().clamp_min(torch.finfo(x.dtype).tiny)


class FP_Linear(_FixedPoint):
    """A fully connected layer (child `linear`, an nn.Linear with bias) whose weight is quantized.

    Maps (..., in_features) to (..., out_features). Nbits and symmetric as in STE; the bias stays float.
    quantizer: "minmax", the STE; "learned", a LearnedStep (parameter `step`, (out_features, 1)); "ternary",
    TernaryLevels (parameter `levels`, (2,)), for Nbits=2. Nbits=None is exactly nn.Linear. Raises as STE and
    code_range do, for Nbits already at construction, and ValueError for another quantizer.
    """

    def __init__(self, in_features, out_features, Nbits=None, symmetric=False, quantizer="minmax"):
        super().__init__(Nbits, symmetric, quantizer)
        self.linear = nn.Linear(in_features, out_features)
        self.reset_step()

    def forward(self, x):
        return F.linear(x, self.quantized_weight(), self.linear.bias)


class FP_Conv(_FixedPoint):
    """A 2D convolution (child `conv`, an nn.Conv2d) whose weight is quantized.

    Maps (N, in_channels, H, W) to (N, out_channels, H', W') as nn.Conv2d does. Nbits and symmetric as in
    STE; a bias stays float. quantizer: "minmax", the STE; "learned", a LearnedStep (parameter `step`,
    (out_channels, 1, 1, 1)); "ternary", TernaryLevels (parameter `levels`, (2,)), for Nbits=2. Nbits=None is
    exactly nn.Conv2d. Raises as STE and code_range do, for Nbits already at construction, and ValueError for
    another quantizer.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False,
                 Nbits=None, symmetric=False, quantizer="minmax"):
        super().__init__(Nbits, symmetric, quantizer)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.reset_step()

    def forward(self, x):
        return F.conv2d(x, self.quantized_weight(), self.conv.bias, self.conv.stride, self.conv.padding)
