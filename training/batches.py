"""CIFAR-10 in batches, augmented where the images are."""

import functools

import torch

from arguments import COUNT, NATURAL, check
from cifar10 import MEAN, STD

PADDING = 4  # pixels by which an image is shifted at most; the assignment's


def normalize(images):
    """Return uint8 images (N, 3, H, W) as float32, the assignment's mean and deviation out."""
    return (images.float() - _per_channel(MEAN, images.device)) / _per_channel(STD, images.device)


@functools.lru_cache
def _per_channel(values, device):
    """Return `values` times 255 as (1, 3, 1, 1) on `device`.

    Made once, as to send them to a GPU is to wait for it.
    """
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def _draw(n, generator):
    """Return n random shifts (2, n, 1), down and right, and n times whether to mirror, (n, 1).

    `generator` is a CPU torch.Generator, so one seed gives one augmentation on every device.
    """
    shifts = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=generator)
    return shifts, torch.rand((n, 1), generator=generator) < 0.5


def _crop_flip(images, shifts, flips):
    """Return images (N, C, H, W), of any dtype, shifted and mirrored as _draw has drawn.

    The distribution is torchvision's RandomCrop(H, PADDING) followed by RandomHorizontalFlip.
    """
    n, _, height, width = images.shape
    device = images.device
    rows = shifts[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    columns = shifts[1] + torch.where(flips, width - 1 - columns, columns)
    padded = torch.nn.functional.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(n, device=device).view(n, 1, 1)
    return padded[image, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def _cut_out(images, centers, side):
    """Return normalized images with a square of zeros each, cut off where it leaves the image.

    images: (N, C, H, W); centers: row and column of each, (2, N, 1); side: pixels.
    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout", 2017.
    """
    height, width = images.shape[2:]
    first = centers - side // 2
    rows, columns = (
        torch.arange(n, device=images.device) - f for n, f in zip((height, width), first)
    )
    inside = [(0 <= distance) & (distance < side) for distance in (rows, columns)]
    return images.masked_fill((inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1), 0)


class Batches:
    """One epoch's batches (x float32 (B, 3, 32, 32), y int64 (B,)) of images held on their device.

    augment: False, the stored order, untouched; True: shuffled, and each image cropped and flipped
    at random, drawn from a generator that `seed` and `epoch` (from 1) determine. cutout: side, in
    pixels, of the square that is then blanked in each image, 0 for none. The last batch may be
    smaller. Iterating twice yields the same batches.

    Raises ValueError for a batch_size or epoch that is not a positive integer, a seed or cutout
    that is not one >= 0, and if images and labels differ in number or there are none.
    """

    def __init__(self, images, labels, batch_size, seed=0, epoch=1, augment=False, cutout=0):
        check(COUNT, batch_size=batch_size, epoch=epoch)
        check(NATURAL, seed=seed, cutout=cutout)
        if len(images) != len(labels):
            raise ValueError("images and labels must be equally many, "
                             f"got {len(images)} and {len(labels)}")
        if not len(images):
            raise ValueError("images must hold at least one image, got none")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.epoch, self.augment, self.cutout = seed, epoch, augment, cutout

    def __iter__(self):
        if not self.augment:
            pairs = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size))
            yield from ((normalize(images), labels) for images, labels in pairs)
            return
        for index, shift, flip, center in self._drawn():
            x = normalize(_crop_flip(self.images[index], shift, flip))
            yield _cut_out(x, center, self.cutout) if self.cutout else x, self.labels[index]

    def _drawn(self):
        """Return, for each batch, its images' indices, shifts, flips and cutout centers.

        All of the epoch's draws are sent to the device at once: to send is to wait for a GPU.
        """
        n, device = len(self.images), self.images.device
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(n, generator=generator)
        drawn = [_draw(len(index), generator) for index in order.split(self.batch_size)]
        shifts, flips = torch.cat([d[0] for d in drawn], 1), torch.cat([d[1] for d in drawn])
        centers = torch.randint(0, 32, (2, n, 1), generator=generator)
        tensors = [tensor.to(device) for tensor in (order, shifts, flips, centers)]
        return zip(*(t.split(self.batch_size, d) for t, d in zip(tensors, (0, 1, 0, 1))))
