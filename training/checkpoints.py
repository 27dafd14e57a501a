"""Weights on disk, and the state that an interrupted training goes on from."""

import io
import re

import torch

from files import atomic_write
from FP_layers import FP_Conv, FP_Linear


def atomic_save(object_, path):
    """torch.save to `path`, whole or not at all; raises OSError, naming `path`, if it cannot."""
    buffer = io.BytesIO()
    torch.save(object_, buffer)  # in memory first: torch reports a full disk without a name
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def save_weights(net, path):
    """Write the net's state dict, tensors and nothing else, to `path`, whole or not at all."""
    atomic_save(snapshot(net), path)


def snapshot(net):
    """Return a copy of the net's state dict on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in net.state_dict().items()}


def fit_quantizers(net):
    """Fit what the quantizers in `net` have learned, in place, to its weights (see FP_layers)."""
    for module in net.modules():
        if isinstance(module, (FP_Conv, FP_Linear)):
            module.fit_quantizer()


def load_weights(net, path):
    """Load a state dict from `path` into `net`, in place, on the net's device; return the net.

    Also taken are a dict around the state dict, "module." or "_orig_mod." before every name (as
    DataParallel and torch.compile write them), BatchNorms without num_batches_tracked, and a float
    checkpoint for layers with a learned step, which is then fitted to the weights.

    Raises FileNotFoundError if there is no such file, and ValueError if it is truncated, no state
    dict of this architecture, or holds NaN or infinite values; the net is unchanged then. Pickled
    code never runs.
    """
    state, expected = _read(path), net.state_dict()
    steps = {name for name in expected if name.endswith(".quantizer.step")}
    fit_anew = bool(steps) and not steps & state.keys()
    counts = {name: tensor for name, tensor in expected.items()
              if name.endswith(".num_batches_tracked") and name not in state}
    state = state | counts
    if fit_anew:
        expected = {name: tensor for name, tensor in expected.items() if name not in steps}
    if state.keys() != expected.keys():
        amiss = sorted(map(str, expected.keys() ^ state.keys()))[:4]
        raise ValueError(f"{path} is a checkpoint of another architecture; "
                         f"names not shared: {amiss}")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, "
                             f"not {tuple(expected[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
    net.load_state_dict(state, strict=not fit_anew)
    if fit_anew:
        fit_quantizers(net)
    return net


def _read(path):
    """Return the state dict in the file `path`, unwrapped; raises as load_weights does."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}") from None
    except Exception as error:
        whole = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's advice would run foreign code
        reason = (f"it holds a {whole[1]}, not tensors alone; save net.state_dict() instead"
                  if whole else str(error).partition("\n")[0].partition(" In PyTorch")[0][:200])
        raise ValueError(f"{path} is not a readable checkpoint of weights: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} is a checkpoint of another architecture: it holds a "
                         f"{type(state).__name__}, not a state dict")
    while prefix := next((p for p in ("module.", "_orig_mod.") if state
                          and all(str(name).startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


# ---------------------------------------------------------------- an interrupted training


class LastWholeEpoch:
    """A context that gives `net` the state last kept, if left by an error or Ctrl-C."""

    def __init__(self, net):
        self.net = net
        self.keep()

    def keep(self):
        """Keep the net as it is now."""
        self.state = snapshot(self.net)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            self.net.load_state_dict(self.state)


def read_state(path):
    """Return what a training left at `path`, a dict, on the CPU; ValueError if it is damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"net", "optimizer", "history", "best", "tag"} - state.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return state
    except Exception as error:
        raise cannot_resume(path, error) from error


def cannot_resume(path, error):
    """Return the ValueError that says so."""
    return ValueError(f"{path} cannot be resumed from ({error}); delete it to start over")
