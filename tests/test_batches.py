"""Batches and their augmentation: against torchvision's, against plain loops, and by statistics."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from training.batches import Batches, _crop_flip, _draw, normalize


def test_normalize_equals_torchvision(cifar):
    oracle = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ]
    )
    images = cifar.test_images[:20]
    expected = torch.stack(
        [oracle(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    )
    torch.testing.assert_close(normalize(images), expected, rtol=0, atol=2e-6)


def crop_flip(images, seed):
    drawn = _draw(len(images), torch.Generator().manual_seed(seed))
    return _crop_flip(images, *(tensor.to(images.device) for tensor in drawn))


def test_each_augmented_image_is_one_of_torchvisions_crops_and_flips(cifar):
    images = cifar.train_images[:300]
    augmented = crop_flip(images, 0)
    padded = TF.pad(images, 4)
    found = torch.zeros(len(images), dtype=torch.bool)
    for top in range(9):
        for left in range(9):
            crop = TF.crop(padded, top, left, 32, 32)
            for candidate in (crop, TF.hflip(crop)):
                found |= (candidate == augmented).flatten(1).all(1)
    assert found.all()


def test_offsets_and_flips_are_uniform_and_independent():
    """Pixels that hold their own coordinates tell which of the 162 outcomes each image got."""
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([row, column]).to(torch.uint8).expand(162 * 100, 2, 32, 32)
    augmented = crop_flip(images, 0).long()
    flipped = augmented[:, 1, 16, 17] < augmented[:, 1, 16, 16]
    top = augmented[:, 0, 16, 16] - 12
    left = augmented[:, 1, 16, 16] - torch.where(flipped, 11, 12)
    outcomes = torch.bincount((top * 9 + left) * 2 + flipped, minlength=162)
    assert len(outcomes) == 162 and outcomes.min() > 0
    assert stats.chisquare(outcomes.numpy()).pvalue > 1e-3


def test_batches_in_stored_order_cover_everything(small_cifar):
    batches = Batches(small_cifar.test_images, small_cifar.test_labels, 64)
    xs, ys = zip(*batches)
    assert [len(x) for x in xs] == [64, 64, 64, 8]
    assert torch.equal(torch.cat(xs), normalize(small_cifar.test_images))
    assert torch.equal(torch.cat(ys), small_cifar.test_labels)


def test_augmented_batches_are_shuffled_and_labels_stay_with_their_images():
    labels = torch.arange(1, 251)
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(250, 3, 32, 32)
    xs, ys = zip(*Batches(images, labels, 64, seed=3, augment=True))
    assert [len(x) for x in xs] == [64, 64, 64, 58]
    order = torch.cat(ys)
    assert not torch.equal(order, labels) and torch.equal(order.sort().values, labels)
    assert torch.equal(torch.cat(xs)[:, :, 16, 16], normalize(images[order - 1])[:, :, 16, 16])


def test_seed_and_epoch_give_the_batches(small_cifar):
    def drawn(seed, epoch=1):
        batches = Batches(small_cifar.train_images, torch.arange(256), 100, seed, epoch, True)
        return [torch.cat(tensors) for tensors in zip(*batches)]

    first, again, other, later = drawn(1), drawn(1), drawn(2), drawn(1, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for x, order in (other, later):
        assert not torch.equal(order, first[1])
        moved = (x[order.argsort()] != first[0][first[1].argsort()]).flatten(1).any(1)
        assert moved.float().mean() > 0.9  # of 162 ways to crop and flip, two seldom agree


def test_to_iterate_twice_gives_the_same_batches(small_cifar):
    batches = Batches(small_cifar.train_images, small_cifar.train_labels, 100, 3, 2, True, 8)
    for (x, y), (again_x, again_y) in zip(batches, batches, strict=True):
        assert torch.equal(x, again_x) and torch.equal(y, again_y)


def test_images_without_labels_are_refused(small_cifar):
    with pytest.raises(ValueError, match="equally many, got 200 and 199"):
        Batches(small_cifar.test_images, small_cifar.test_labels[1:], 10)
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        Batches(small_cifar.test_images[:0], small_cifar.test_labels[:0], 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cutout", [0, 8])
def test_one_seed_gives_one_augmentation_on_every_device(small_cifar, cutout):
    images, labels = small_cifar.train_images, small_cifar.train_labels
    assert torch.equal(crop_flip(images.cuda(), 7).cpu(), crop_flip(images, 7))
    ours = Batches(images, labels, 100, 3, 2, True, cutout)
    theirs = Batches(images.cuda(), labels.cuda(), 100, 3, 2, True, cutout)
    for (x, y), (gpu_x, gpu_y) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gpu_x.cpu(), x)
        assert torch.equal(gpu_y.cpu(), y)


# ---------------------------------------------------------------- cutout


def blanked(row, column, side):
    """Return which pixels of an image a cutout around (row, column) blanks, by the definition."""
    padded = np.zeros((64, 64), bool)  # where no square leaves it
    top, left = 16 + row - side // 2, 16 + column - side // 2
    padded[top:top + side, left:left + side] = True
    return padded[16:48, 16:48]


@pytest.mark.parametrize("side", [1, 5, 16])
def test_a_cutout_blanks_one_square_that_may_lie_anywhere_and_nothing_else(side):
    """White images: no pixel, normalized, is zero, neither theirs nor those that crops move in."""
    images, labels = torch.full((4096, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(4096)
    squares = {blanked(i, j, side).tobytes(): (i, j) for i in range(32) for j in range(32)}
    assert len(squares) == 1024
    centers = []
    for (x, _), (plain, _) in zip(Batches(images, labels, 512, augment=True, cutout=side),
                                  Batches(images, labels, 512, augment=True)):
        zero = x == 0
        assert (plain != 0).all() and torch.equal(x, torch.where(zero, 0, plain))
        assert torch.equal(zero, zero[:, :1].expand_as(zero))  # the same in all channels
        centers += [squares[mask.numpy().tobytes()] for mask in zero[:, 0]]
    rows, columns = (torch.tensor(values) for values in zip(*centers))
    for outcomes, cells in ((rows, 32), (columns, 32), (rows // 4 * 8 + columns // 4, 64)):
        counts = torch.bincount(outcomes, minlength=cells)
        assert len(counts) == cells and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_cutout_larger_than_the_image_may_blank_it_all(small_cifar):
    batches = Batches(small_cifar.train_images, small_cifar.train_labels, 256,
                      augment=True, cutout=64)
    assert all((x == 0).all() for x, _ in batches)


# ---------------------------------------------------------------- draws and defaults


@pytest.mark.parametrize("seed, epoch, digest", [
    (0, 1, "abc54d707f21fe77"), (0, 2, "c63cc03bd0e9f79c"), (3, 1, "ff09c9b14dbbb911")])
def test_the_draws_of_a_seed_and_an_epoch_stay_what_they_are(seed, epoch, digest):
    """A record could not be trained again, nor an interrupted run go on, if they changed."""
    images, found = torch.zeros(300, 3, 32, 32, dtype=torch.uint8), hashlib.sha256()
    for draws in Batches(images, torch.arange(300), 128, seed, epoch, True)._drawn():
        for tensor in draws:
            found.update(tensor.long().contiguous().numpy().tobytes())
    assert found.hexdigest()[:16] == digest


def test_seed_and_epoch_have_the_defaults_of_the_first(small_cifar):
    images, labels = small_cifar.train_images, small_cifar.train_labels
    pairs = zip(Batches(images, labels, 100, augment=True),
                Batches(images, labels, 100, seed=0, epoch=1, augment=True), strict=True)
    assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other))
