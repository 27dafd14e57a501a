"""Fixed-point (quantized-weight) layers: the straight-through estimator and the two layers built on it."""

import math  # noqa: F401  (math, np and F are re-exported, see __all__)
import operator

import numpy as np  # noqa: F401
import torch
import torch.nn as nn
import torch.nn.functional as F

# Notebooks written against the course's skeleton rely on `from FP_layers import *` for these names too.
__all__ = ["STE", "FP_Conv", "FP_Linear", "check_n_bits", "torch", "nn", "F", "math", "np", "device"]

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
        raise TypeError(f"Nbits must be None or an integer, got {Nbits!r}") from None
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
    bit, or if w has a NaN or infinite element or a range too large for its dtype (not checked inside
    torch.compile, where NaN reaches the loss instead).

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
        if not torch.compiler.is_compiling() and not torch.isfinite(alpha):
            raise ValueError(f"w must be finite with a finite range, got min {x.min()} and max {x.max()}")

        divisor = torch.where(alpha > 0, alpha, torch.ones_like(alpha))  # a constant w: 0 / 1, not 0 / 0
        ws = (x - beta) / divisor  # in [0, 1], symmetric in [-1, 1]
        wq = torch.round(ws * step) / step * alpha + beta
        return torch.where(x == 0, torch.zeros_like(wq), wq).to(w.dtype)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


class FP_Linear(nn.Module):
    """A fully connected layer (child `linear`, an nn.Linear with bias) whose weight passes through the STE.

    Maps (..., in_features) to (..., out_features). Nbits and symmetric as in STE; the bias stays float.
    Nbits=None is exactly nn.Linear. Raises as STE does, for Nbits already at construction.
    """

    def __init__(self, in_features, out_features, Nbits=None, symmetric=False):
        super().__init__()
        self.Nbits = check_n_bits(Nbits, symmetric)
        self.symmetric = bool(symmetric)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x):
        return F.linear(x, STE.apply(self.linear.weight, self.Nbits, self.symmetric), self.linear.bias)

    def extra_repr(self):
        return f"Nbits={self.Nbits}, symmetric={self.symmetric}"


class FP_Conv(nn.Module):
    """A 2D convolution (child `conv`, an nn.Conv2d) whose weight passes through the STE.

    Maps (N, in_channels, H, W) to (N, out_channels, H', W') as nn.Conv2d does. Nbits and symmetric as in
    STE; a bias stays float. Nbits=None is exactly nn.Conv2d. Raises as STE does, for Nbits already at
    construction.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=False,
                 Nbits=None, symmetric=False):
        super().__init__()
        self.Nbits = check_n_bits(Nbits, symmetric)
        self.symmetric = bool(symmetric)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x):
        weight = STE.apply(self.conv.weight, self.Nbits, self.symmetric)
        return F.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)

    def extra_repr(self):
        return f"Nbits={self.Nbits}, symmetric={self.symmetric}"
