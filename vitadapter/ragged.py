# SPDX-License-Identifier: Apache-2.0
"""Batches of images of different sizes: each at the top left of its place, padding after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vitadapter_ops import _checks

from .backbones.protocol import Grid, Step
from .images import ceil_div, described_image

Start = Callable[[Tensor], tuple[Tensor, Grid, Sequence[Step]]]


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Makes one batch of images of different sizes.

        maps = model(*vitadapter.pad_images([first, second]))

    Args:
        images: tensors [C, h, w], normalised, of any sizes.

    Returns:
        The images [B, C, H, W], H and W the largest height and width, padded with zeros at the
        bottom and right; and the padding mask [B, H, W], True where a pixel is padding.

    Raises:
        TypeError: images is no list or tuple of tensors.
        ValueError: there are none; or they have no three dimensions or no pixels, or differ in
            their channels, dtypes or devices.
    """
    if not isinstance(images, list | tuple):
        raise TypeError(f"images: expected a list of tensors, got {type(images).__name__}")
    if not images:
        raise ValueError("images: expected at least one tensor, got none")
    for index, image in enumerate(images):
        name = f"images[{index}]"
        _checks.is_tensor(name, image, described_image)
        _checks.rank(name, image, "C, h, w")
        # While a graph is made its sizes may be unknown.
        if not torch.compiler.is_compiling() and not image.numel():
            raise ValueError(f"{name}: expected at least one pixel, got shape {list(image.shape)}")
        _checks.dtype(name, image, (images[0].dtype,), " (that of images[0])")
        _checks.device(name, image, images[0].device, "images[0]")
        _checks.shape(name, image, (images[0].shape[0], *image.shape[1:]), "images[0] but for h, w")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for index, image in enumerate(images):
        h, w = image.shape[1:]
        batch[index, :, :h, :w] = image
        mask[index, :h, :w] = False
    return batch, mask


class RaggedBatch:
    """The sizes of the images of a batch.

    An image alone is padded with zeros to whole patches, or multiples of the coarsest stride. On a
    map of stride s, its region is what this covers. Whatever looks at neighbours must find outside
    of the region what it finds outside of the map of the image alone.

    Args:
        padding_mask: [B, H, W] bool, True where a pixel is padding. Its values are read: on a GPU
            that is a synchronisation.
        images: [B, C, H, W].
        patch_size: the least height and width of an image.

    Attributes:
        sizes: (h, w) of each image in pixels.

    Raises:
        TypeError: padding_mask is no tensor.
        ValueError: it has another shape, dtype or device; or its values cannot be read, or do not
            leave of each image a rectangle at the top left, of at least one patch.
    """

    def __init__(self, padding_mask: Tensor, images: Tensor, patch_size: int) -> None:
        _checks.is_tensor("padding_mask", padding_mask)
        batch, _, height, width = images.shape
        if padding_mask.dtype != torch.bool:
            raise ValueError(
                "padding_mask: expected torch.bool, True where a pixel is padding, got "
                f"{padding_mask.dtype}; of a mask of ones where pixels are (pixel_mask of "
                "transformers), pass pixel_mask == 0"
            )
        _checks.shape("padding_mask", padding_mask, (batch, height, width), "images")
        _checks.device("padding_mask", padding_mask, images.device, "images")
        if padding_mask.is_meta or torch._C._get_tracing_state() or torch.compiler.is_exporting():
            raise ValueError(
                "padding_mask: expected None on the meta device, in torch.export and in "
                "torch.jit.trace, for the sizes of images are read from its values, got a mask"
            )
        inside = ~padding_mask
        self._sizes = torch.stack((inside[:, :, 0].sum(1), inside[:, 0].sum(1)), 1)
        fits = (self._outside(self._sizes, height, width) == padding_mask).flatten(1).all(1)
        sizes = torch.cat((self._sizes, fits[:, None]), 1).tolist()
        for index, (h, w, is_rectangle) in enumerate(sizes):
            if not is_rectangle:
                raise ValueError(
                    "padding_mask: expected each image at the top left and True in all rows below "
                    f"it and all columns right of it, got another mask of image {index}"
                )
            if h < patch_size or w < patch_size:
                raise ValueError(
                    f"padding_mask: expected h, w >= {patch_size} (one patch) of each image, got "
                    f"{h}x{w} pixels that are no padding of image {index}"
                )
        self.sizes = [(h, w) for h, w, _ in sizes]

    def regions(self, stride: int, multiple: int) -> list[tuple[int, int]]:
        """(h, w) of each image's region on a map, for images padded to multiples of `multiple`."""
        return [
            (ceil_div(h, multiple) * multiple // stride, ceil_div(w, multiple) * multiple // stride)
            for h, w in self.sizes
        ]

    def outside(self, shape: Grid, stride: int, multiple: int) -> Tensor:
        """[B, H, W] bool, True outside of the images' regions on a map of `shape` = (H, W)."""
        regions = (self._sizes + multiple - 1) // multiple * multiple // stride
        return self._outside(regions, *shape)

    @staticmethod
    def _outside(regions: Tensor, height: int, width: int) -> Tensor:
        rows = torch.arange(height, device=regions.device) >= regions[:, :1]
        columns = torch.arange(width, device=regions.device) >= regions[:, 1:]
        return rows[:, :, None] | columns[:, None]

    def cleared(self, x: Tensor, stride: int, multiple: int) -> Tensor:
        """The map x [B, C, H, W] of this stride, zero outside of the images' regions."""
        shape = (x.shape[2], x.shape[3])
        if all(region == shape for region in self.regions(stride, multiple)):
            return x
        # Channels last, as maps are in memory: masked_fill of the map itself would lose that.
        outside = self.outside(shape, stride, multiple)[..., None]
        return x.permute(0, 2, 3, 1).masked_fill(outside, 0).permute(0, 3, 1, 2)

    def start(
        self, start: Start, images: Tensor, *, patch_size: int, multiple: int, prefix: int
    ) -> tuple[Tensor, Grid, list[Step]]:
        """Tokens, grid and blocks of a vision transformer that sees each image alone.

        It runs on all images of one size at once, and on each size in turn: no backbone needs to
        know of padding, and no time is spent on it. Patch tokens in the padding repeat those at the
        image's edge, as what resizes the map of the image alone does.

        Args:
            start: `Backbone.start`.
            images: [B, C, H, W], H and W multiples of `multiple`.
            patch_size: of the transformer.
            multiple: the image alone is padded to multiples of this.
            prefix: number of class and register tokens, P.

        Returns:
            Tokens [B, P + h*w, D] before the first block, the grid (h, w) of the largest image, and
            one callable for each block, which maps tokens to tokens.
        """
        members: dict[tuple[int, int], list[int]] = {}
        for index, region in enumerate(self.regions(1, multiple)):
            members.setdefault(region, []).append(index)
        rows = torch.split(images, 1)
        started = [
            start(torch.cat([rows[index] for index in indices])[:, :, :h, :w])
            for (h, w), indices in members.items()
        ]
        shape = (images.shape[2] // patch_size, images.shape[3] // patch_size)
        groups = _Groups(list(members.values()), [grid for _, grid, _ in started], shape, prefix)
        blocks = zip(*(steps for _, _, steps in started), strict=True)
        return (
            groups.join([tokens for tokens, _, _ in started]),
            shape,
            [partial(groups.each, steps) for steps in blocks],
        )


class _Groups:
    """How the tokens of all images [B, P + H*W, D] fall into those of images of one size.

    Args:
        members: the images of each group.
        grids: (h, w) of each group.
        shape: (H, W), which all grids fit into.
        prefix: number of class and register tokens, P.
    """

    def __init__(
        self, members: list[list[int]], grids: list[Grid], shape: Grid, prefix: int
    ) -> None:
        self.members = members
        self.grids = grids
        self.shape = shape
        self.prefix = prefix

    def each(self, functions: Sequence[Step], x: Tensor) -> Tensor:
        """Applies to the tokens of each group its own function."""
        parts = zip(functions, self.split(x), strict=True)
        return self.join([function(part) for function, part in parts])

    def split(self, x: Tensor) -> list[Tensor]:
        """The groups' tokens [b, P + h*w, D], without those of padding."""
        rows = torch.split(x, 1)
        parts = []
        for indices, (h, w) in zip(self.members, self.grids, strict=True):
            part = torch.cat([rows[index] for index in indices])
            body = torch.unflatten(part[:, self.prefix :], 1, self.shape)[:, :h, :w]
            parts.append(torch.cat((part[:, : self.prefix], body.flatten(1, 2)), dim=1))
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`; tokens of padding repeat those at the image's edge."""
        height, width = self.shape
        rows: dict[int, Tensor] = {}
        for indices, (h, w), part in zip(self.members, self.grids, parts, strict=True):
            body = torch.unflatten(part[:, self.prefix :], 1, (h, w))
            body = torch.cat((body, body[:, :, -1:].expand(-1, -1, width - w, -1)), dim=2)
            body = torch.cat((body, body[:, -1:].expand(-1, height - h, -1, -1)), dim=1)
            joined = torch.cat((part[:, : self.prefix], body.flatten(1, 2)), dim=1)
            rows.update(zip(indices, torch.split(joined, 1), strict=True))
        return torch.cat([rows[index] for index in range(len(rows))])
