"""The network out of the library: as an ONNX file, in float32 or in 8-bit integers."""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace

import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

from training.batches import normalize
from training.inference import for_evaluation


def export_onnx(net):
    """Return `net`, on any device, as the bytes of an ONNX file that computes what it evaluates.

    BatchNorms are folded and weights are the quantized ones, in float32. The input "images" is
    normalized, (N, 3, 32, 32) for any N, the output "logits" (N, classes). `net` is not changed.
    """
    twin = for_evaluation(copy.deepcopy(net).cpu().eval())
    program = torch.onnx.export(
        twin, (torch.zeros(2, 3, 32, 32),), input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False)
    ClearMetadataAndDocStringPass()(program.model)  # in which lines of whose files it began
    model = program.model_proto
    onnx.checker.check_model(model)
    return model.SerializeToString()


def calibration_images(data):
    """Return 500 training images of a cifar10.CIFAR10 as a net sees them, on the CPU."""
    return normalize(data.train_images[:500].cpu())


def quantize_int8(model, images):
    """Return a float ONNX file's bytes as those of one that computes in 8-bit integers.

    Weights are signed, with a step for each output channel; activations unsigned, with a step and a
    zero point for each tensor, from its least and largest value on `images`, which are normalized,
    (N, 3, 32, 32). The work is onnxruntime's static quantization, in its QDQ format.
    """
    batches = ({"images": batch.numpy()} for batch in images.split(50))
    reader = SimpleNamespace(get_next=lambda: next(batches, None))
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, result = (Path(folder, name) for name in ("a", "b", "c"))
        source.write_bytes(model)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, result, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8)
        return result.read_bytes()
