"""Conditions: joining, padding, moving."""

from __future__ import annotations

import pytest
import torch

from cascade.conditioning import Conditioning, concatenate, pad_text


def conditions(count: int, tokens: int, low_res: bool = False) -> Conditioning:
    return Conditioning(
        torch.randn(count, tokens, 4, generator=torch.Generator().manual_seed(tokens)),
        torch.ones(count, tokens, dtype=torch.bool),
        torch.full((count, 3, 2, 2), 0.5) if low_res else None,
        torch.full((count, 1, 1, 1), 3.0) if low_res else None,
    )


def test_joined_texts_are_padded_with_masked_tokens() -> None:
    short, long = conditions(2, 3), conditions(1, 5)
    joined = concatenate([short, long])
    assert len(joined) == 3
    assert joined.text_mask.sum(1).tolist() == [3, 3, 5]
    assert torch.equal(joined.text[:2, :3], short.text)
    assert torch.equal(joined.text[2:], long.text)
    assert not joined.text[:2, 3:].any()
    assert joined.low_res is None


def test_joined_conditions_keep_their_smaller_pictures() -> None:
    joined = concatenate([conditions(2, 3, low_res=True), conditions(1, 3, low_res=True)])
    assert joined.low_res is not None
    assert joined.low_res.shape == (3, 3, 2, 2)
    assert joined.low_res_log_snr is not None
    assert joined.low_res_log_snr.shape == (3, 1, 1, 1)


def test_either_all_have_a_smaller_picture_or_none() -> None:
    with pytest.raises(AssertionError, match="smaller picture"):
        concatenate([conditions(1, 3, low_res=True), conditions(1, 3)])


def test_text_of_the_right_length_is_not_copied() -> None:
    cond = conditions(1, 3)
    assert pad_text(cond.text, cond.text_mask, 3)[0] is cond.text


def test_another_text_keeps_the_picture() -> None:
    cond, other = conditions(2, 3, low_res=True), conditions(2, 5)
    changed = cond.with_text(other.text, other.text_mask)
    assert changed.text is other.text
    assert changed.text_mask is other.text_mask
    assert changed.low_res is cond.low_res
    assert changed.low_res_log_snr is cond.low_res_log_snr


def test_a_cast_leaves_mask_and_noise_level_alone() -> None:
    cast = conditions(2, 3, low_res=True).to(dtype=torch.bfloat16)
    assert cast.low_res is not None
    assert cast.low_res_log_snr is not None
    assert [cast.text.dtype, cast.low_res.dtype] == [torch.bfloat16, torch.bfloat16]
    assert cast.text_mask.dtype == torch.bool
    assert cast.low_res_log_snr.dtype == torch.float32


def test_moving_moves_everything() -> None:
    moved = conditions(2, 3, low_res=True).to("meta")
    assert moved.low_res is not None
    assert moved.low_res_log_snr is not None
    assert all(t.is_meta for t in (moved.text, moved.text_mask, moved.low_res, moved.low_res_log_snr))
