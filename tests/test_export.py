"""The network out of the library: the same answers elsewhere, and files whole or not there."""

import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from conftest import REPOSITORY, make_net, same, state_of

import cifar10
from benchmarks import runtimes
from experiments.run import load_checkpoint
from model_file import __main__ as command_line
from model_file.__main__ import main
from model_file.network import CompressionError, decompress
from training.batches import normalize

RUN = "lab3d_2bit_improved"


@pytest.fixture(scope="module")
def net():
    return load_checkpoint(RUN).eval()


@pytest.fixture(scope="module")
def exporter():
    """model_file.export, with libraries that take long to import and that only this file needs."""
    from model_file import export

    return export


@pytest.fixture(scope="module")
def model(exporter, net):
    return exporter.export_onnx(net)


@pytest.fixture(scope="module")
def int8(exporter, model, cifar):
    return exporter.quantize_int8(model, exporter.calibration_images(cifar))


@pytest.fixture(scope="module")
def images(cifar):
    return normalize(cifar.test_images[:200])


def weights_of(data):
    """{name: array} of the constants with more than one axis."""
    tensors = onnx.load_from_string(data).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in tensors if len(t.dims) > 1}


# ---------------------------------------------------------------- float


def test_the_logits_are_those_of_pytorch_for_any_number_of_images(net, model, images):
    exported = runtimes.OnnxNet(model)
    with torch.no_grad():
        for n in (1, 2, 7, 200):
            torch.testing.assert_close(exported(images[:n]), net(images[:n]), rtol=0, atol=1e-3)
            assert torch.equal(exported(images[:n]).argmax(1), net(images[:n]).argmax(1))


def test_a_net_in_training_is_exported_and_left_alone(exporter, images):
    """Of another quantizer than RUN's; ready for evaluation, all are plain convolutions."""
    net = make_net(Nbits=4).train()
    before = state_of(net)
    exported = runtimes.OnnxNet(exporter.export_onnx(net))
    assert net.training and same(state_of(net), before)
    with torch.no_grad():
        torch.testing.assert_close(exported(images[:5]), net.eval()(images[:5]),
                                   rtol=1e-3, atol=1e-3)


def test_the_weights_are_the_quantized_ones_times_a_scale(net, model):
    """Of three values in each output channel of a residual stage, and as many zeros as the net."""
    weights = [w for w in weights_of(model).values() if w.ndim == 4 and w.dtype == np.float32]
    body = [m.quantized_weight() for n, m in net.named_modules()
            if n.startswith("body_op") and hasattr(m, "conv")]
    assert len(weights) == len(body) + 1
    per_channel = [len(np.unique(channel)) for w in weights for channel in w if w.shape[1] > 3]
    assert max(per_channel) == 3
    # a channel whose scale is 0 has more of them
    zeros = sum(int((w == 0).sum()) for w in weights if w.shape[1] > 3)
    assert zeros >= sum(int((w == 0).sum()) for w in body)


def test_the_file_holds_no_batchnorm_and_no_name_of_a_place(model):
    graph = onnx.load_from_string(model).graph
    assert "Conv" in {node.op_type for node in graph.node}
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert b".py" not in model and str(REPOSITORY).encode() not in model
    assert [i.name for i in graph.input] == ["images"] and graph.output[0].name == "logits"


# ---------------------------------------------------------------- 8-bit integers


def test_weights_and_activations_are_integers_of_8_bits(int8):
    graph = onnx.load_from_string(int8).graph
    zeros = {t.name: t.data_type for t in graph.initializer if t.name.endswith("_zero_point")}
    integers = {name: w for name, w in weights_of(int8).items() if w.dtype == np.int8}
    assert sorted(w.ndim for w in integers.values()) == [2] + [4] * 21
    assert not [w for w in weights_of(int8).values() if w.dtype == np.float32]
    activations = {t for name, t in zeros.items() if "relu" in name.lower() or "images" in name}
    assert activations == {onnx.TensorProto.UINT8}
    steps = {t.name: t.dims for t in graph.initializer if t.name.endswith("_scale")}
    for name, w in integers.items():  # a step for each output channel
        if w.ndim == 4:
            assert steps[name.removesuffix("_quantized") + "_scale"] == [len(w)]


def test_the_answers_in_8_bits_are_nearly_those_in_float(model, int8, images):
    float_, integers = (runtimes.OnnxNet(data)(images) for data in (model, int8))
    assert (float_.argmax(1) == integers.argmax(1)).float().mean() > 0.97
    assert 0 < (float_ - integers).abs().max() < 3  # of logits up to 15


def test_calibration_sees_training_images_only(exporter, cifar):
    class Training:
        """Data whose test images cannot be looked at."""

        train_images = cifar.train_images

    images = exporter.calibration_images(Training)
    assert torch.equal(images, normalize(cifar.train_images[:500]))


def test_the_command_calibrates_on_training_images(monkeypatch, tmp_path, cifar, model, int8):
    monkeypatch.setattr("model_file.export.export_onnx", lambda net: model)
    blind = cifar10.CIFAR10(cifar.train_images, cifar.train_labels, None, None)
    monkeypatch.setattr(command_line, "get_data", lambda device: blind)
    assert main(["export", RUN, str(tmp_path / "net.onnx"), "--int8"]) == 0
    images = normalize(cifar.test_images[:50])
    written = runtimes.OnnxNet((tmp_path / "net.onnx").read_bytes())
    assert torch.equal(written(images), runtimes.OnnxNet(int8)(images))


def test_other_images_give_other_steps(exporter, model, cifar):
    """What the images are is what the steps come from."""
    dark = exporter.quantize_int8(model, exporter.calibration_images(cifar)[:50] * 0.01)
    images = normalize(cifar.test_images[:100])
    lost = runtimes.OnnxNet(dark)(images).argmax(1) != runtimes.OnnxNet(model)(images).argmax(1)
    assert lost.float().mean() > 0.2


# ---------------------------------------------------------------- the command


def run(capsys, *arguments):
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_what_is_written_is_what_is_exported(tmp_path, capsys, model, images):
    status, out, err = run(capsys, "export", RUN, tmp_path / "folder" / "net.onnx")
    data = (tmp_path / "folder" / "net.onnx").read_bytes()
    assert status == 0 and f"{len(data):,} bytes" in out and not err
    assert torch.equal(runtimes.OnnxNet(data)(images), runtimes.OnnxNet(model)(images))
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "net.onnx"]


def test_how_a_checkpoint_is_quantized_can_be_said(tmp_path, capsys, monkeypatch):
    """A student's file does not say it; without a word, its float weights are exported."""
    exported = []
    monkeypatch.setattr("model_file.export.export_onnx", lambda net: exported.append(net) or b"net")
    torch.save(load_checkpoint("lab3c_3bit").state_dict(), tmp_path / "mine.pt")
    for options in ([], ["--bits", 3], ["--bits", 3, "--symmetric"]):
        out = tmp_path / f"{len(options)}.onnx"
        assert run(capsys, "export", tmp_path / "mine.pt", out, *options)[0] == 0
    stage = [net.body_op[0].conv1[0] for net in exported]
    assert [layer.Nbits for layer in stage] == [None, 3, 3]
    assert [len(layer.quantized_weight().unique()) for layer in stage[1:]] == [8, 7]


def no_export(net):
    raise AssertionError("must be refused before it is exported")


@pytest.mark.parametrize("checkpoint, out, message", [
    (RUN, "there", "there is there already: remove it, or choose another name"),
    (RUN, "file/net.onnx", "cannot write"),
    ("lab9", "net.onnx", "name must be one of teacher, pretrain, lab2c"),
    ("lab3c_5bit", "net.onnx", "no checkpoint at"),
    ("nothing.pt", "net.onnx", "no checkpoint at nothing.pt"),
])
def test_what_cannot_be_exported_is_an_error_in_one_line(
    checkpoint, out, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("model_file.export.export_onnx", no_export)
    for name in ("there", "file"):
        (tmp_path / name).write_bytes(b"was here")
    status, printed, err = run(capsys, "export", checkpoint, tmp_path / out)
    assert status == 1 and err.startswith("error: ") and message in err and not printed
    assert err.count("\n") == 1 and (tmp_path / "there").read_bytes() == b"was here"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


def test_a_file_of_another_kind_is_not_unpacked(model, tmp_path, capsys):
    with pytest.raises(CompressionError, match="must start with b'RNPQ'"):
        decompress(model)
    (tmp_path / "net.onnx").write_bytes(model)
    status, out, err = run(capsys, "unpack", tmp_path / "net.onnx", tmp_path / "net.pt")
    assert status == 1 and "that `pack` wrote must start with b'RNPQ'" in err and not out
    assert not (tmp_path / "net.pt").exists()


@pytest.mark.slow
def test_other_commands_do_without_onnx(tmp_path):
    code = ("import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
            "from model_file.__main__ import main\n"
            f"assert main(['pack', {RUN!r}, {str(tmp_path / 'a')!r}]) == 0\n"
            f"assert main(['info', {str(tmp_path / 'a')!r}]) == 0\n")
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


# ---------------------------------------------------------------- killed, and two at once

# with an export that needs none of the libraries, which take a process longer than the rest
QUICK = """
import sys
from types import SimpleNamespace
sys.modules["model_file.export"] = SimpleNamespace(
    export_onnx=lambda net: {model}, calibration_images=None, quantize_int8=None)
"""
KILLED = QUICK.format(model="bytes(1_000_000)") + """
import os, signal
real = os.{function}
def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
os.{function} = killed
from model_file.__main__ import main
main({arguments!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("command, function", [("pack", "replace"), ("export", "fsync")])
def test_killed_while_it_writes_there_is_no_half_file(command, function, tmp_path, monkeypatch):
    """The name is not there; the command then works as ever."""
    out, arguments = tmp_path / "out", [command, RUN, str(tmp_path / "out")]
    script = KILLED.format(function=function, arguments=arguments)
    process = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    monkeypatch.setattr("model_file.export.export_onnx", lambda net: bytes(1_000_000))
    assert main(arguments) == 0 and out.stat().st_size > 30_000


TWO = QUICK.format(model="sys.argv[1].encode() * 3_000_000") + """
from model_file.__main__ import main
print("ready", flush=True)
sys.stdin.readline()
sys.exit(main(["export", {run!r}, {out!r}]))
"""


@pytest.mark.slow
def test_two_exports_at_once_leave_one_whole_file(tmp_path):
    out = tmp_path / "net.onnx"
    script, pipe = TWO.format(run=RUN, out=str(out)), subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", script, letter], cwd=REPOSITORY, text=True,
                         stdin=pipe, stdout=pipe, stderr=pipe)
        for letter in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    results = [process.communicate("go\n", timeout=300) for process in processes]
    statuses = [process.returncode for process in processes]
    assert 0 in statuses
    for status, (_, err) in zip(statuses, results):  # one may have come too late
        assert status == 0 or status == 1 and "is there already" in err
    data = out.read_bytes()
    assert len(data) == 3_000_000 and len(set(data)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


# ---------------------------------------------------------------- how fast it answers


def test_what_is_measured_is_what_was_computed(cifar):
    def forward(images):
        until = time.thread_time() + 0.004 * len(images) ** 0.5
        while time.thread_time() < until:
            pass
        time.sleep(0.01)  # does not count
        return images.flatten(1)[:, :10]

    images = cifar.test_images[:120]
    found = runtimes.measure(forward, images, single=5)
    assert torch.equal(found.classes, normalize(images).flatten(1)[:, :10].argmax(1))
    assert 0.004 <= found.latency < 0.008
    assert 50 / 0.04 < found.throughput <= 50 / (0.004 * 50**0.5)


def test_pytorch_has_one_thread_while_it_is_measured(cifar):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    try:
        runtimes.measure(lambda x: (seen.append(torch.get_num_threads()), x.flatten(1))[1],
                         cifar.test_images[:2], single=1)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("flags, has", [
    ("sse2 avx2 avx512_vnni", True), ("avx_vnni", True), ("amx_int8 amx_bf16", True),
    ("avx512f avx512bw", False), ("", False),
])
def test_processors_that_multiply_8_bit_integers(flags, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    assert runtimes.multiplies_int8(tmp_path / "cpuinfo") == has
    assert not runtimes.multiplies_int8(tmp_path / "none")
