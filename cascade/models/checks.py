"""What a network asks of its input, whichever network it is."""

from __future__ import annotations

from torch import Tensor

from cascade.conditioning import Conditioning


def check_conditions(cond: Conditioning, low_res_channels: int) -> None:
    """Raises ValueError when a smaller picture is missing, or there without a place for it."""
    complete = cond.low_res is not None and cond.low_res_log_snr is not None
    if low_res_channels and not complete:
        raise ValueError("a super-resolution network needs low_res and low_res_log_snr in its conditions")
    if not low_res_channels and cond.low_res is not None:
        raise ValueError("a base network sees no smaller picture; leave low_res out of its conditions")


def check_size(z: Tensor, low_res: Tensor | None, step: int) -> None:
    """z: (B, C, H, W), H and W multiples of `step`; low_res: (B, 3, H, W). Raises ValueError for other sizes."""
    height, width = z.shape[-2:]
    if height % step or width % step:
        raise ValueError(
            f"height {height} and width {width} must be multiples of {step}, by which this network divides them"
        )
    if low_res is not None and low_res.shape[-2:] != z.shape[-2:]:
        raise ValueError(
            f"low_res is {low_res.shape[-2]} x {low_res.shape[-1]}, the noisy picture {height} x {width};"
            " upsample it to the same size"
        )
