"""A net made ready for evaluation: weights quantized and BatchNorms folded once, not once a batch.
"""

import copy

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.fusion import fuse_conv_bn_weights

from FP_layers import FP_Conv, FP_Linear


@torch.no_grad()
def for_evaluation(net):
    """Return a net that computes what `net` does in evaluation mode, in less time.

    Wherever an FP_Conv and a BatchNorm2d follow each other in an nn.Sequential, they become one
    convolution with the quantized weight times gamma / sqrt(var + eps), and the rest of the
    BatchNorm as its bias. Other quantized layers become plain ones. All tensors are parameters or
    buffers, as torch.export wants them; those that need no folding are shared with `net`, so use
    the result before training goes on. `net`, which must be in evaluation mode, is not changed. A
    net that may compute anything (see is_plain) is returned as it is. Raises as FP_Conv does if its
    weights cannot be quantized.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2.
    """
    return _folded(net) if is_plain(net) else net


def _folded(net):
    if isinstance(net, FP_Linear):
        return _with_weight(net.linear, net.quantized_weight(), net.linear.bias)
    if isinstance(net, FP_Conv):
        return _with_weight(net.conv, net.quantized_weight(), net.conv.bias)
    twin = copy.copy(net)  # shallow: its own dictionary of children, the same parameters
    children = dict(net._modules)
    names = list(children) if isinstance(net, nn.Sequential) else []
    for conv, norm in zip(names, names[1:]):
        layer, batch_norm = children[conv], children[norm]
        if (isinstance(layer, FP_Conv) and isinstance(batch_norm, nn.BatchNorm2d)
                and batch_norm.track_running_stats):
            weight, bias = fuse_conv_bn_weights(
                layer.quantized_weight(), layer.conv.bias, batch_norm.running_mean,
                batch_norm.running_var, batch_norm.eps, batch_norm.weight, batch_norm.bias)
            weight = weight.contiguous(memory_format=torch.channels_last)
            children[conv] = _with_weight(layer.conv, weight, bias)
            children[norm] = nn.Identity()
    twin._modules = {name: child and _folded(child) for name, child in children.items()}
    return twin


def _with_weight(layer, weight, bias):
    """Return a copy of an nn.Conv2d or nn.Linear that computes with another weight and bias."""
    twin = copy.copy(layer)
    twin._parameters = {
        name: tensor if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        for name, tensor in (("weight", weight), ("bias", bias))}
    return twin


def is_plain(net):
    """Return whether `net` computes just what its modules' classes and state tell.

    Not so for hooks, computed weights (torch.nn.utils.prune and parametrize), classes that are
    neither PyTorch's layers nor ours, such as subclasses, and a forward bound to one object, as of
    a compiled net.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
                   or not _is_known(type(module)) for module in net.modules())


def _is_known(cls):
    """Return whether a class and its forward are layers of torch.nn or ours."""
    return all(origin.startswith("torch.nn.modules.") or origin in ("FP_layers", "resnet20")
               for origin in (cls.__module__, cls.forward.__module__))
