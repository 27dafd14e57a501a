"""How fast a network answers on one thread of a CPU, by that thread's own time."""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch

from training.batches import normalize

BATCH = 50
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # as Linux names them


class Answers(NamedTuple):
    """What `measure` found: the class of each image, and medians of the time it took."""

    classes: torch.Tensor
    latency: float  # seconds for one image
    throughput: float  # images a second, in batches of BATCH


@torch.no_grad()
def measure(forward, images, single=100):
    """Return the Answers of forward(normalized images), which returns logits, on uint8 images.

    images: (N, 3, 32, 32) on the CPU; the first `single` of them are also taken one by one.
    PyTorch gets one thread meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ones = [_timed(forward, normalize(image))[1] for image in images[:single].split(1)]
        batches = [_timed(forward, normalize(batch)) for batch in images.split(BATCH)]
    finally:
        torch.set_num_threads(threads)
    seconds = statistics.median(seconds for _, seconds in batches)
    classes = torch.cat([logits.argmax(1) for logits, _ in batches])
    return Answers(classes, statistics.median(ones), min(BATCH, len(images)) / seconds)


class OnnxNet:
    """An ONNX file's bytes, to be called as a net is: onnxruntime, on one thread of the CPU."""

    def __init__(self, model):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])

    def __call__(self, images):
        return torch.from_numpy(self.session.run(["logits"], {"images": images.numpy()})[0])


def _timed(forward, images):
    started = time.thread_time()  # not the clock's: others may run on the same core
    return forward(images), time.thread_time() - started


def multiplies_int8(cpuinfo=Path("/proc/cpuinfo")):
    """Return whether Linux tells of instructions that multiply 8-bit integers, VNNI or AMX."""
    return cpuinfo.exists() and not INT8_FLAGS.isdisjoint(cpuinfo.read_text().split())
