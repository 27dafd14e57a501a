"""The net made ready for evaluation computes what the net computes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import train_utils
from conftest import first_of, same, state_of
from FP_layers import FP_Conv, FP_Linear, Learned
from resnet20 import ResNet_Block, ResNetCIFAR
from train_utils import evaluate
from training import batches as training_batches
from training.batches import normalize
from training.inference import for_evaluation, is_plain

QUANTIZERS = [
    dict(),
    dict(Nbits=4),
    dict(Nbits=2),
    dict(Nbits=3, symmetric=True),
    dict(Nbits=2, quantizer=Learned),
    dict(Nbits=0),
]


def lively(num_layers=14, **arguments):
    """A net whose BatchNorms are far from their defaults, one gamma exactly zero, in evaluation
    mode.
    """
    torch.manual_seed(0)
    net = ResNetCIFAR(num_layers, **arguments)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (
                module.weight.data,
                module.bias.data,
                module.running_mean,
                module.running_var,
            ):
                tensor.uniform_(0.5, 1.5)
            module.weight.data[0] = 0
    return net.eval()


@pytest.fixture(scope="module")
def small_cifar(cifar):
    """70 real test images; nothing here trains."""
    return first_of(cifar, 1, 70)


@pytest.fixture
def x(small_cifar):
    return normalize(small_cifar.test_images[:64])


# ---------------------------------------------------------------- the same logits


@torch.no_grad()
@pytest.mark.parametrize("arguments", QUANTIZERS, ids=str)
def test_logits_are_those_of_the_net(arguments, x):
    net = lively(**arguments)
    before = state_of(net)
    expected = net(x)
    torch.testing.assert_close(for_evaluation(net)(x), expected, rtol=1e-4, atol=1e-4)
    assert same(net.state_dict(), before)
    assert torch.equal(net(x), expected)


@torch.no_grad()
def test_every_quantized_weight_is_quantized_once_and_every_batchnorm_folded(
    monkeypatch, small_cifar
):
    calls, quantize = [], FP_Conv.quantized_weight
    monkeypatch.setattr(
        FP_Conv, "quantized_weight", lambda self: calls.append(self) or quantize(self)
    )
    net = lively(Nbits=4)
    evaluate(net, small_cifar, batch_size=7)  # ten batches
    layers = [module for module in net.modules() if isinstance(module, FP_Conv)]
    assert len(calls) == len(layers) and set(calls) == set(layers)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in for_evaluation(net).modules())


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.head_conv[0].register_forward_hook(lambda *_: _[-1] * 2),
        lambda net: net.body_op[1].conv2[1].register_forward_pre_hook(lambda *_: (_[-1][0] + 1,)),
        lambda net: net.body_op[1].register_forward_hook(lambda *_: _[-1] * 2),
        lambda net: setattr(
            net.head_conv[0], "forward", lambda x: x.mean(1, keepdim=True).expand(-1, 16, -1, -1)
        ),
        lambda net: setattr(net, "forward", lambda x: torch.zeros(len(x), 10)),
        lambda net: net.head_conv.__setitem__(2, nn.Sigmoid()),
        lambda net: net.head_conv.__setitem__(1, nn.Identity()),
        lambda net: net.head_conv.__setitem__(
            1, nn.BatchNorm2d(16, track_running_stats=False).eval()
        ),
        lambda net: net.head_conv.__setitem__(1, nn.BatchNorm2d(16, affine=False).eval()),
        lambda net: setattr(net.head_conv[1], "eps", 1.0),
        lambda net: net.body_op.__setitem__(1, net.body_op[0]),  # one block, twice
    ],
    ids=[
        "hook",
        "pre-hook",
        "hook on a block",
        "forward of a layer",
        "forward of the net",
        "activation",
        "no norm",
        "batch statistics",
        "plain norm",
        "another epsilon",
        "shared",
    ],
)
def test_a_net_that_was_tampered_with_computes_what_it_computes(change, x):
    net = lively(Nbits=4)
    untouched = net(x)
    change(net)
    assert not torch.allclose(net(x), untouched)
    torch.testing.assert_close(for_evaluation(net)(x), net(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_class_whose_forward_was_replaced_computes_what_it_computes(monkeypatch, x):
    net = lively(Nbits=4)
    untouched = net(x)
    monkeypatch.setattr(FP_Linear, "forward", lambda self, x: self.linear(x) + 1)
    assert not is_plain(net)
    torch.testing.assert_close(for_evaluation(net)(x), net(x))
    assert not torch.allclose(net(x), untouched)


@torch.no_grad()
def test_a_convolution_s_own_bias_is_folded_too(x):
    torch.manual_seed(0)
    layers = FP_Conv(3, 8, 3, 1, 1, bias=True, Nbits=4), nn.BatchNorm2d(8)
    net = nn.Sequential(*layers).eval()
    layers[0].conv.bias.uniform_(1, 2)
    twin = for_evaluation(net)
    assert isinstance(twin[1], nn.Identity)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_that_no_batchnorm_follows_keep_their_bits_and_bias(x):
    torch.manual_seed(0)
    net = nn.Sequential(FP_Conv(3, 8, 3, 4, 1, bias=True, Nbits=2), nn.Flatten(),
                        FP_Linear(512, 10, Nbits=2)).eval()
    torch.testing.assert_close(for_evaluation(net)(x), net(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_missing_child_stays_missing():
    block = ResNet_Block(3, 4, 1).eval()
    block.register_module("spare", None)
    x = torch.randn(2, 3, 8, 8)
    twin = for_evaluation(block)
    assert twin is not block and twin.spare is None
    torch.testing.assert_close(twin(x), block(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what the twin is made of


@pytest.mark.parametrize("arguments", QUANTIZERS, ids=str)
def test_a_twin_has_plain_layers_and_no_tensor_but_parameters_and_buffers(arguments, x):
    net = lively(**arguments)
    twin = for_evaluation(net)
    assert not twin(x[:2]).requires_grad  # its logits may go to NumPy as they are
    for module in twin.modules():
        assert not isinstance(module, (FP_Conv, FP_Linear))
        assert all(isinstance(p, nn.Parameter) for p in module._parameters.values()
                   if p is not None)
        assert not [name for name, value in vars(module).items() if torch.is_tensor(value)]
    named = dict(twin.named_parameters())
    assert not any(name.endswith("step") for name in named)
    assert {name for name in named if name.startswith("final_fc")} == {"final_fc.weight",
                                                                       "final_fc.bias"}


@pytest.mark.parametrize("arguments", [dict(), dict(Nbits=2, quantizer=Learned)], ids=str)
def test_a_twin_can_be_exported(arguments, x):
    net = lively(**arguments)
    with torch.no_grad():
        exported = torch.export.export(for_evaluation(net), (x,)).module()
        torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- evaluate, against a plain loop


def plainly(net, data):
    """Loss and accuracy by the definition, in one batch and in double precision after the logits.
    """
    forward = copy.deepcopy(net).eval() if net.training else net
    with torch.no_grad():
        logits = forward(normalize(data.test_images)).double()
    loss = nn.functional.cross_entropy(logits, data.test_labels).item()
    return loss, (logits.argmax(1) == data.test_labels).double().mean().item()


@pytest.mark.parametrize("arguments", [dict(), dict(Nbits=4)], ids=str)
@pytest.mark.parametrize("batch_size", [None, 33])
def test_evaluate_equals_a_plain_evaluation(small_cifar, arguments, batch_size):
    net = lively(**arguments)
    assert evaluate(net, small_cifar, batch_size) == pytest.approx(
        plainly(net, small_cifar), rel=1e-4
    )


@pytest.mark.parametrize("threads, size", [(1, 25), (2, 50), (16, 400)])
def test_on_a_cpu_a_batch_has_25_images_for_each_thread(small_cifar, monkeypatch, threads, size):
    sizes = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(train_utils, "Batches",
                        lambda *data: sizes.append(data[2]) or training_batches.Batches(*data))
    evaluate(lively(), small_cifar)
    assert sizes == [size]


@pytest.mark.slow
def test_a_compiled_net_is_evaluated_as_what_was_compiled(small_cifar):
    net = lively(Nbits=4)
    compiled = torch.compile(net, backend="eager")
    assert evaluate(compiled, small_cifar) == pytest.approx(plainly(net, small_cifar), rel=1e-4)


def poison_weight(net):
    net.final_fc.linear.weight.data[3, 0] = math.nan


def poison_variance(net):
    net.body_op[2].conv1[1].running_var[0] = -1.0


def poison_mean(net):
    net.head_conv[1].running_mean[5] = -math.inf


@pytest.mark.parametrize("poison", [poison_weight, poison_variance, poison_mean])
def test_nan_is_not_hidden(small_cifar, poison):
    net = lively()
    poison(net)
    loss, accuracy = evaluate(net, small_cifar)
    expected_loss, expected_accuracy = plainly(net, small_cifar)
    assert math.isnan(loss) and math.isnan(expected_loss) and accuracy == expected_accuracy


def test_a_net_whose_weights_cannot_be_quantized_is_refused_and_left_as_it_was(small_cifar):
    net = lively(Nbits=4).train()
    net.body_op[0].conv1[0].conv.weight.data[0] = math.nan
    net.head_conv[1].eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises(ValueError, match="w must be finite"):
        evaluate(net, small_cifar)
    assert [module.training for module in net.modules()] == modes


def test_each_module_keeps_its_mode(small_cifar):
    net = lively().train()
    net.head_conv[1].eval()  # as when its statistics are to stay
    modes = [module.training for module in net.modules()]
    evaluate(net, small_cifar)
    assert (
        [module.training for module in net.modules()] == modes and True in modes and False in modes
    )


# ---------------------------------------------------------------- a net that may compute anything


@pytest.fixture
def two_batches(monkeypatch, small_cifar):
    """`test` takes 70 images, 50 of them in the first batch."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(train_utils, "get_data", lambda device: small_cifar)


def plain_net():
    """A net of torch's own layers, as a reader may write one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                        nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(16, 10)).eval()
    net[-1].weight.data.mul_(4)  # so that what its layers compute shows in the loss
    return net


def pruned(net, layers):
    prune.global_unstructured([(layer, "weight") for layer in layers],
                              pruning_method=prune.L1Unstructured, amount=0.7)


def old_weight_norm(net, layers):
    for layer in layers:
        layer.weight.data.mul_(1.5)
        torch.nn.utils.weight_norm(layer)
        layer.weight_g.data.mul_(1.5)  # a plain layer's weight follows in its next forward pass


def weight_norm(net, layers):
    for layer in layers:
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data.mul_(1.5)


def spectral_norm(net, layers):
    for layer in layers:
        parametrizations.spectral_norm(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("make", [lambda: lively(8), lambda: lively(8, Nbits=4), plain_net],
                         ids=["ResNet", "4-bit ResNet", "plain"])
@pytest.mark.parametrize("change", [pruned, old_weight_norm, weight_norm, spectral_norm])
def test_computed_weights_are_tested_as_they_compute(two_batches, capsys, change, make):
    net = make()
    change(net, [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    data = train_utils.get_data("cpu")
    loss, accuracy = plainly(net, data)
    assert not is_plain(net) and for_evaluation(net) is net
    assert (loss, accuracy) != pytest.approx(plainly(make(), data), rel=1e-3)
    assert train_utils.test(net) == pytest.approx(accuracy)
    assert capsys.readouterr().out == f"Test Loss={loss:.4f}, Test accuracy={accuracy:.4f}\n"


class Remembering(ResNetCIFAR):
    """Keeps what its reader wants to look at, as a notebook's class may."""

    passes = 0

    def forward(self, x):
        self.features = self.avg_pool(self.body_op(self.head_conv(x))).flatten(1)
        self.passes += 1
        return self.final_fc(self.features)


def test_what_a_forward_stores_in_a_test_is_there_afterwards(two_batches):
    net = Remembering(num_layers=8)
    train_utils.test(net)
    last = train_utils.get_data("cpu").test_images[-len(net.features):]
    assert net.passes == 2  # 70 images, 50 of them in the first batch
    with torch.no_grad():
        expected = net.avg_pool(net.body_op(net.head_conv(normalize(last)))).flatten(1)
    torch.testing.assert_close(net.features, expected, rtol=1e-4, atol=1e-4)


def test_what_a_hook_stores_in_a_test_is_there_afterwards(two_batches):
    net, seen = lively(Nbits=4), []

    def hook(module, inputs, output):
        module.seen = getattr(module, "seen", 0) + len(output)
        net.activations = output
        seen.append(module)

    for module in (net, net.body_op[3].conv2[0], net.head_conv[1]):
        module.register_forward_hook(hook)
    train_utils.test(net)
    assert [module.seen for module in (net, net.body_op[3].conv2[0], net.head_conv[1])] == [70] * 3
    assert seen.count(net) == 2 and net.activations.shape == (20, 10)


@pytest.mark.parametrize("register", [nn.modules.module.register_module_forward_hook,
                                      nn.modules.module.register_module_forward_pre_hook])
def test_a_hook_on_all_modules_is_heard(two_batches, register):
    net, seen = lively(), []
    x = normalize(train_utils.get_data("cpu").test_images[:50])
    handle = register(lambda *arguments: seen.append(1))
    try:
        net(x)
        once = len(seen)
        train_utils.test(net)
        assert once > 50 and len(seen) == once + 2 * once and not is_plain(net)
    finally:
        handle.remove()
    assert is_plain(net)
