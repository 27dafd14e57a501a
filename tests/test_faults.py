"""What can go wrong from outside, really done: signals, full disks, read-only folders, hostile files, odd arguments."""

import signal

import pytest
import torch

import train_utils
from train_utils import fit
from test_train_utils import make_net, same

RECIPE = dict(batch_size=64, lr=0.05, weight_decay=1e-3, schedule="constant", seed=3)


# ---------------------------------------------------------------- Ctrl-C


def interrupt_in_step(net, step):
    """Have `net` receive a real SIGINT, as from a notebook's stop button, in its training step number `step`."""
    steps = []

    def hook(module, inputs):
        steps.append(1)
        if len(steps) == step:
            signal.raise_signal(signal.SIGINT)

    return net.register_forward_pre_hook(lambda module, inputs: hook(module, inputs) if module.training else None)


@pytest.mark.parametrize("n_bits, pruned_in", [(None, None), (4, None), (None, 2)])
def test_ctrl_c_leaves_the_last_whole_epoch(small_cifar, n_bits, pruned_in):
    """Four steps an epoch; the seventh is in the middle of the second, whose pruning is undone too."""
    def before_epoch(epoch, net):
        if epoch == pruned_in:
            torch.nn.init.zeros_(net.body_op[0].conv1[0].conv.weight)

    whole = make_net(Nbits=n_bits)
    fit(whole, epochs=1, data=small_cifar, **RECIPE)
    net = make_net(Nbits=n_bits)
    hook = interrupt_in_step(net, 7)
    with pytest.raises(KeyboardInterrupt):
        fit(net, epochs=3, data=small_cifar, before_epoch=before_epoch, **RECIPE)
    hook.remove()
    assert same(net.state_dict(), whole.state_dict())
    assert train_utils.evaluate(net, small_cifar) == train_utils.evaluate(whole, small_cifar)


def test_after_ctrl_c_training_goes_on_to_the_same_bits(small_cifar, tmp_path):
    unbroken = make_net()
    fit(unbroken, epochs=3, data=small_cifar, **RECIPE)
    net = make_net()
    hook = interrupt_in_step(net, 7)
    with pytest.raises(KeyboardInterrupt):
        fit(net, epochs=3, data=small_cifar, state_path=tmp_path / "state.pt", **RECIPE)
    hook.remove()
    fit(net, epochs=3, data=small_cifar, state_path=tmp_path / "state.pt", **RECIPE)
    assert same(net.state_dict(), unbroken.state_dict())


def test_an_epoch_that_was_whole_before_its_state_could_not_be_written_is_kept(small_cifar, monkeypatch, tmp_path):
    whole, net = make_net(), make_net()
    fit(whole, epochs=1, data=small_cifar, **RECIPE)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_utils, "atomic_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(net, epochs=3, data=small_cifar, state_path=tmp_path / "state.pt", **RECIPE)
    assert same(net.state_dict(), whole.state_dict())


# ---------------------------------------------------------------- a GPU without memory


def out_of_memory_in_step(net, step):
    """Have `net` run out of memory in its training step number `step`, as CUDA reports it."""
    steps = []

    def hook(module, inputs):
        steps.extend([1] * module.training)
        if len(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return net.register_forward_pre_hook(hook)


def test_out_of_memory_suggests_a_smaller_batch_and_keeps_what_was_reached(small_cifar, tmp_path):
    whole, net, unbroken = make_net(), make_net(), make_net()
    fit(whole, epochs=1, data=small_cifar, **RECIPE)
    fit(unbroken, epochs=3, data=small_cifar, **RECIPE)
    hook = out_of_memory_in_step(net, 7)
    complaint = "memory in epoch 2 with batch_size=64; try batch_size=32.*2.00 GiB"
    with pytest.raises(torch.OutOfMemoryError, match=complaint):
        fit(net, epochs=3, data=small_cifar, state_path=tmp_path / "state.pt", **RECIPE)
    hook.remove()
    assert same(net.state_dict(), whole.state_dict())
    fit(net, epochs=3, data=small_cifar, state_path=tmp_path / "state.pt", **RECIPE)
    assert same(net.state_dict(), unbroken.state_dict())
