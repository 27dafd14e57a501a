"""The architecture against published counts and a ResNet-20 written with torch.nn.functional alone.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from FP_layers import STE, FP_Conv, FP_Linear, Learned
from pruning import prunable_layers
from resnet20 import ResNet_Block, ResNetCIFAR


def expected_keys():
    """The names in the course's checkpoint, spelled out for ResNet-20."""

    def norm(prefix):
        return [
            f"{prefix}.{name}"
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ]

    keys = ["head_conv.0.conv.weight", *norm("head_conv.1")]
    for block in range(9):
        parts = ["conv1", "conv2"] + ["id_mapping"] * (block in (3, 6))
        for part in parts:
            keys += [f"body_op.{block}.{part}.0.conv.weight", *norm(f"body_op.{block}.{part}.1")]
    return keys + ["final_fc.linear.weight", "final_fc.linear.bias"]


def plain_resnet20(state, x, training=False):
    """ResNet-20 from its definition: no module of ours, only the checkpoint's tensors."""

    def conv_norm(x, prefix, stride):
        weight = state[f"{prefix}.0.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = (
            state[f"{prefix}.1.running_mean"].clone(),
            state[f"{prefix}.1.running_var"].clone(),
        )
        return F.batch_norm(
            x, mean, var, state[f"{prefix}.1.weight"], state[f"{prefix}.1.bias"], training
        )

    head = {key.replace("head_conv.", "head."): value for key, value in state.items()}
    state = {**state, **head}
    x = conv_norm(x, "head", 1).relu()
    for block in range(9):
        stride = 2 if block in (3, 6) else 1
        y = conv_norm(x, f"body_op.{block}.conv1", stride).relu()
        y = conv_norm(y, f"body_op.{block}.conv2", 1)
        x = (y + (conv_norm(x, f"body_op.{block}.id_mapping", 2) if stride == 2 else x)).relu()
    return F.linear(x.mean((2, 3)), state["final_fc.linear.weight"], state["final_fc.linear.bias"])


@pytest.fixture
def lively_net():
    """A ResNet-20 whose BatchNorm statistics and affine parameters are no longer their defaults."""
    torch.manual_seed(0)
    net = ResNetCIFAR()
    for name, tensor in net.state_dict().items():
        if ".1." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_state_has_the_keys_of_the_course():
    keys = list(ResNetCIFAR().state_dict())
    assert len(keys) == 128
    assert keys == expected_keys()


# He et al. count identity shortcuts; the two 1x1 projections with their BatchNorms add 2,752.
@pytest.mark.parametrize(
    "num_layers, published", [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)]
)
def test_parameters_are_as_many_as_published(num_layers, published):
    net = ResNetCIFAR(num_layers=num_layers)
    assert sum(p.numel() for p in net.parameters()) == published + 2752
    if num_layers == 20:
        assert published + 2752 == 272_474


def test_twice_the_width_has_twice_the_channels_and_the_same_tensors(x):
    nets = [ResNetCIFAR(width=width).eval() for width in (16, 32)]
    assert [net.width for net in nets] == [16, 32]
    narrow, wide = (net.state_dict() for net in nets)
    assert list(narrow) == list(wide) and nets[1](x).shape == (4, 10)
    for name, tensor in narrow.items():
        channels = [n if n in (1, 3, 10) else 2 * n for n in tensor.shape[:2]]
        assert list(wide[name].shape) == channels + list(tensor.shape[2:])
    assert [layer.weight.shape[0] for name, layer in prunable_layers(nets[1])
            if name.endswith("conv1.0")] == [32] * 3 + [64] * 3 + [128] * 3


@pytest.mark.parametrize("width", [0, -16, 16.0, True, "16", None])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(ValueError, match="^width must be a positive integer, got "):
        ResNetCIFAR(width=width)


def test_20_layers_with_268336_weights_are_prunable():
    layers = prunable_layers(ResNetCIFAR())
    assert len(layers) == 20 and sum(layer.weight.numel() for _, layer in layers) == 268_336


@pytest.mark.parametrize("training", [False, True])
def test_output_equals_a_plain_resnet20(lively_net, x, training):
    lively_net.train(training)
    state = {name: tensor.clone() for name, tensor in lively_net.state_dict().items()}
    logits = lively_net(x)
    assert logits.shape == (4, 10)
    torch.testing.assert_close(logits, plain_resnet20(state, x, training), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_bits, symmetric", [(2, False), (4, False), (4, True)])
def test_the_stages_and_nothing_else_are_quantized(lively_net, x, n_bits, symmetric):
    quantized_net = ResNetCIFAR(Nbits=n_bits, symmetric=symmetric).eval()
    quantized_net.load_state_dict(lively_net.state_dict())
    state = {
        name: STE.apply(tensor, n_bits, symmetric)
        if name.startswith("body_op") and "conv.weight" in name
        else tensor
        for name, tensor in lively_net.state_dict().items()
    }
    torch.testing.assert_close(quantized_net(x), plain_resnet20(state, x), rtol=1e-4, atol=1e-4)


def test_levels_are_not_symmetric_unless_asked():
    for part, symmetric in ((ResNetCIFAR(8, 3), False), (ResNetCIFAR(8, 3, True), True),
                            (ResNet_Block(16, 32, 2, 3), False),
                            (ResNet_Block(16, 32, 2, 3, True), True)):
        layers = [m for m in part.modules() if isinstance(m, FP_Conv) and m.Nbits is not None]
        assert len(layers) >= 3
        for layer in layers:
            assert torch.equal(layer.quantized_weight(), STE.apply(layer.weight, 3, symmetric))


def test_bits_are_read_from_the_layers_and_cannot_be_set_for_the_whole_net():
    net = ResNetCIFAR(8, 3)
    with pytest.raises(AttributeError):
        net.Nbits = 2
    assert net.Nbits == net.body_op[0].conv1[0].Nbits == 3 and ResNetCIFAR(8).Nbits is None


@pytest.mark.parametrize("num_layers", [8, 20])
def test_a_learned_quantizer_is_in_the_stages_and_nowhere_else(num_layers, x):
    net = ResNetCIFAR(num_layers, 3, True, Learned)
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (FP_Conv, FP_Linear))}
    assert len(layers) == num_layers + 2  # with the two projections
    for name, layer in layers.items():
        learned = isinstance(layer.quantizer, Learned)
        assert learned == name.startswith("body_op")
        assert layer.Nbits == (3 if learned else None)
    net(x).square().sum().backward()
    assert all(layer.quantizer.step.grad.any() for name, layer in layers.items() if "body" in name)


def test_every_parameter_gets_a_gradient_through_the_quantizers(x):
    net = ResNetCIFAR(Nbits=3)
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(
    "in_chs, out_chs, strides, shape",
    [
        (16, 16, 1, (2, 16, 8, 8)),
        (16, 32, 2, (2, 32, 4, 4)),
        (16, 32, 1, (2, 32, 8, 8)),
        (32, 16, 1, (2, 16, 8, 8)),
        (16, 16, 2, (2, 16, 4, 4)),
    ],
)
def test_a_block_projects_its_shortcut_where_shapes_differ(in_chs, out_chs, strides, shape):
    block = ResNet_Block(in_chs, out_chs, strides)
    assert block(torch.randn(2, in_chs, 8, 8)).shape == shape
    assert bool(list(block.id_mapping.parameters())) == (strides != 1 or in_chs != out_chs)
    assert all(layer.Nbits is None for layer in block.modules() if isinstance(layer, FP_Conv))


def test_any_integer_type_counts_layers():
    assert len(ResNetCIFAR(num_layers=np.int64(14)).body_op) == 6
