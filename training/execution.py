"""How a net is computed fastest on this machine: in bfloat16 or float32, compiled or not."""

import copy
import math
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from arguments import COUNT, check
from FP_layers import FP_Conv
from training.batches import Batches

MARGIN = 1.1  # how many times faster a candidate must be, so that noise does not flip the choice
LONG = 1000  # steps from which on a run gains more than the choice and a compilation cost
WAYS = {"bf16": "bfloat16", "compile": "torch.compile", "graph": "a CUDA graph"}


@dataclass(frozen=True)
class Execution:
    """How a net is computed: bf16, under bfloat16 autocast; compile, by torch.compile; graph, on a
    GPU, its kernels launched as one CUDA graph; threads.

    Weights stay float32. Without bf16 a GPU's convolutions may round to TF32, as PyTorch is set;
    see exact_convolutions. threads: of a CPU, as many as PyTorch would take if None; they decide in
    which order sums are taken, and with it the last bits. Raises ValueError, naming the field, for
    what is no boolean or no positive integer.
    """

    bf16: bool = False
    compile: bool = False
    graph: bool = False
    threads: int | None = None

    def __post_init__(self):
        check((True, False), bf16=self.bf16, compile=self.compile, graph=self.graph)
        if self.threads is not None:
            check(COUNT, threads=self.threads)

    def of(self, net):
        """Return a function that maps images, (B, 3, 32, 32), to the net's logits, float32."""
        run = _CompiledForOneSize(net) if self.compile else net
        dtype = next((p.dtype for p in net.parameters()), torch.float32)  # net.half() is taken too

        def forward(images):
            images = images.to(dtype, memory_format=torch.channels_last)
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16,
                                cache_enabled=False):  # no weight is used twice
                return run(images).float()

        on_gpu = next((p.is_cuda for p in net.parameters()), False)
        return _GraphedForOneSize(net, forward) if self.graph and on_gpu else forward

    @contextmanager
    def in_its_threads(self):
        """A context in which PyTorch computes with so many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def exact_convolutions():
    """A context in which a GPU's float32 convolutions do not round to TF32."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # since PyTorch 2.9, where the two ways to set it must not be mixed
        place, name, rounded, exact = cudnn.conv, "fp32_precision", "tf32", "ieee"
    else:
        place, name, rounded, exact = cudnn, "allow_tf32", True, False
    before = getattr(place, name)
    try:
        if before == rounded:
            setattr(place, name, exact)
        yield
    finally:
        if before == rounded:
            setattr(place, name, before)


class _CompiledForOneSize:
    """A net compiled for batches of the size that comes first; others it takes uncompiled.

    A second size would cost as much compilation as the first, and there is one such batch an epoch.
    """

    def __init__(self, net):
        self.net, self.size = net, None
        self.compiled = torch.compile(net, dynamic=False)

    def __call__(self, x):
        self.size = self.size or len(x)
        return self.compiled(x) if len(x) == self.size else self.net(x)


class _GraphedForOneSize:
    """`forward` of `net` as a CUDA graph for batches of the size that comes first.

    A GPU computes a small net's kernels faster than Python launches them one by one. Another size,
    and a net in another mode, it computes without a graph.
    """

    def __init__(self, net, forward):
        self.net, self.forward, self.captured = net, forward, None

    def __call__(self, images):
        kind = len(images), self.net.training
        if self.captured is None:
            self.captured = kind
            buffers = [(buffer, buffer.clone()) for buffer in self.net.buffers()]
            module = _Module(self.net, self.forward)
            self.graphed = torch.cuda.make_graphed_callables(module, (images.clone(),))
            for buffer, before in buffers:  # the warm-up has moved BatchNorm's statistics
                buffer.copy_(before)
        return (self.graphed if kind == self.captured else self.forward)(images)


class _Module(nn.Module):
    """`forward` as a module with the parameters of `net`, which make_graphed_callables wants."""

    def __init__(self, net, forward):
        super().__init__()
        self.net, self.compute = net, forward
        self.training = net.training

    def forward(self, images):
        return self.compute(images)


def fastest(net, batch_size, steps=math.inf):
    """Return the Execution in which `net` trains fastest on its device, from a few steps of each.

    For fewer than LONG steps that is float32, uncompiled, without a trial. Else it is tried, one
    after the other, with what is faster kept: bfloat16 where the hardware multiplies it and its
    convolutions are right (see bf16_is_right), and compilation where there is a compiler; on a GPU
    a CUDA graph, then bfloat16. So compiled float32 is timed only where bfloat16 was not taken: a
    compilation takes half a minute. What takes more is taken only if it is MARGIN times faster,
    and what fails is left out, with a warning.
    """
    chosen = Execution()
    if steps < LONG:
        return chosen
    device = next(net.parameters()).device
    bf16, compiled = ["bf16"] * has_bf16(device), ["compile"] * has_compiler()
    seconds = seconds_a_step(net, batch_size, chosen)
    for way in ["graph", *bf16] if device.type == "cuda" else [*bf16, *compiled]:
        candidate = replace(chosen, **{way: True})
        try:
            if way == "bf16" and not bf16_is_right(net):
                continue
            took = seconds_a_step(net, batch_size, candidate)
        except Exception as error:  # of many kinds: no headers, no linker, no memory
            warnings.warn(f"{WAYS[way]} fails and is left out: {error!r:.300}", stacklevel=2)
            continue
        if MARGIN * took < seconds:
            chosen, seconds = candidate, took
    return chosen


def has_compiler():
    """Return whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def seconds_a_step(net, batch_size, how=Execution(), steps=4):
    """Return the seconds of a training step of `net`, the least of `steps` after two others.

    A copy of `net` is trained, on random images. Raises ValueError if batch_size or steps is not a
    positive integer.
    """
    check(COUNT, batch_size=batch_size, steps=steps)
    net = copy.deepcopy(net).to(memory_format=torch.channels_last).train()
    device = next(net.parameters()).device
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (batch_size,), device=device)
    optimizer, forward = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9), how.of(net)
    seconds = []
    for _ in range(2 + steps):
        started = time.perf_counter()
        for x, y in Batches(images, labels, batch_size, augment=True):
            loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


# ---------------------------------------------------------------- bfloat16


def has_bf16(device):
    """Return whether the hardware of `device` multiplies bfloat16; else it would be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def bf16_is_right(net):
    """Return whether each kind of convolution in `net` is right in bfloat16, forward and backward.

    Right: output and both gradients differ from float32's, for the same rounded inputs, by at most
    0.01 of their norm; bfloat16's own rounding is 0.002. Wrong kernels are reported on some
    processors (pytorch issue 163347).
    """
    seen, device = {}, next(net.parameters()).device

    def note(module, inputs):
        seen[tuple(module.weight.shape), module.stride, inputs[0].shape[2:]] = module.padding

    probe = copy.deepcopy(net)
    for module in probe.modules():
        if isinstance(module, FP_Conv):  # which calls F.conv2d, not its child
            module.register_forward_pre_hook(
                lambda outer, inputs: note(outer.conv, inputs))
        elif isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        probe(torch.zeros(1, 3, 32, 32, device=device))
    generator = torch.Generator().manual_seed(0)
    for (shape, stride, size), padding in seen.items():
        x = torch.randn(8, shape[1], *size, generator=generator).to(device).bfloat16()
        w = torch.randn(shape, generator=generator).to(device).bfloat16()
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            a = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
            b = w.to(dtype, memory_format=torch.channels_last).requires_grad_()
            y = F.conv2d(a, b, stride=stride, padding=padding)
            if not results:
                g = torch.randn(y.shape, generator=generator).to(device).bfloat16()
            results.append([y, *torch.autograd.grad(y, (a, b), g.to(dtype))])
        for exact, rounded in zip(*results):
            if not (exact - rounded.float()).norm() <= 0.01 * exact.norm():  # NaN is wrong
                return False
    return True
