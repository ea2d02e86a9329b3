"""A 3x3 convolution after nearest-neighbour enlargement, as four 2x2 ones of the small picture: 16 taps, not 36.

Enlargement turns each pixel into 2x2 equal ones, so several taps of a kernel read the same small pixel and their sum
is one tap. Which taps coincide depends on the phase: whether the kernel's centre is in an even or an odd row and
column. The result is equal up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.models.winograd import AT_ONCE

MEETING = ([[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]])
"""The taps, of three, that read the first and the second small pixel, in even and in odd rows or columns."""


def transform_kernel(weight: Tensor) -> Tensor:
    """(C, C_in, 3, 3) -> (2, 2, C, 2, 2, C_in): a channels-last kernel for even and odd rows, even and odd columns."""
    meeting = torch.tensor(MEETING, dtype=torch.promote_types(weight.dtype, torch.float32))
    channels, channels_in = weight.shape[:2]
    kernel = weight.new_empty(2, 2, channels, 2, 2, channels_in)
    for part, place in zip(weight.split(AT_ONCE), kernel.split(AT_ONCE, dim=2), strict=True):
        place.copy_(torch.einsum("rai,ocij,sbj->rsoabc", meeting, part.to(meeting.dtype), meeting))
    return kernel


def convolve(h: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """h: (B, C_in, H, W); kernel: from `transform_kernel` -> (B, C, 2 H, 2 W), channels last."""
    batch, _, height, width = h.shape
    result = h.new_empty(batch, height, 2, width, 2, kernel.shape[2])
    for row in range(2):
        for column in range(2):
            padded = F.pad(h, (1 - column, column, 1 - row, row))
            pixels = F.conv2d(padded, kernel[row, column].permute(0, 3, 1, 2), bias)
            result[:, :, row, :, column] = pixels.permute(0, 2, 3, 1)
    return result.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
