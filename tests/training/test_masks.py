"""Masks for the loss: which pixels count, and that a mask is cut, mirrored and resized with its picture."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_training import SUPER_RESOLUTION, micro_config, trainer
from PIL import Image

from cascade.data.folder import FolderRecords
from cascade.data.loader import batches
from cascade.data.records import BadRecordError
from cascade.data.transforms import decode, prepared
from cascade.diffusion.loss import Weighting, diffusion_loss
from cascade.diffusion.schedules import ReverseStep
from cascade.errors import CascadeError

MASKED = "data.sources=[{kind: folder, path: FOLDER, masks: true}]"


def with_masks(folder: Path, size: tuple[int, int] = (12, 8)) -> Path:
    """Four pictures, each the negative of its mask, white where padded, as the mask is black; the last has no mask."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(4):
        own = np.where(rng.random((size[1], size[0], 1)) < 0.5, 0, 255).astype(np.uint8).repeat(3, axis=2)
        Image.fromarray(own).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}")
        if index < 3:
            Image.fromarray(255 - own[..., 0]).save(folder / f"{index}-masklabel.png")
    return folder


def masked(folder: Path) -> str:
    return MASKED.replace("FOLDER", str(folder))


def test_black_parts_have_no_gradient_and_the_loss_is_the_weighted_mean_over_all_pixels() -> None:
    torch.manual_seed(0)
    x, eps, output = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    weights = torch.ones(2, 1, 4, 4)
    weights[0, :, :, 2:] = 0.0
    weights[1, :, 1] = 0.25
    weighting = Weighting(pixels=weights)
    loss = diffusion_loss(lambda *_: output, "eps", weighting, x, torch.zeros(2, 1, 1, 1), eps)
    loss.sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad[0, :, :, 2:], torch.zeros(3, 4, 2))
    assert bool((output.grad[0, :, :, :2] != 0).all())
    torch.testing.assert_close(output.grad[1, :, 1], 0.25 * 2 * (output - eps)[1, :, 1].detach() / 48)
    torch.testing.assert_close(loss[1], ((output - eps)[1].square() * weights[1]).sum() / 48)


def test_the_variational_bound_is_weighted_alike() -> None:
    torch.manual_seed(0)
    x, eps, output = torch.rand(1, 3, 2, 2), torch.randn(1, 3, 2, 2), torch.randn(1, 6, 2, 2, requires_grad=True)
    level = torch.zeros(1, 1, 1, 1)
    step = ReverseStep(before=level + 1, small=level - 2, large=level - 1)
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 1.0]]]])

    def gradient(pixels: torch.Tensor | None) -> torch.Tensor:
        weighting = Weighting(variance=1.0, step=step, pixels=pixels)
        loss = diffusion_loss(lambda *_: output, "eps", weighting, x, level, eps)
        return torch.autograd.grad(loss.sum(), output)[0]

    assert bool((gradient(None)[:, 3:] != 0).all())
    torch.testing.assert_close(gradient(weights), weights * gradient(None))


@pytest.mark.parametrize(
    "changes",
    [
        ("data.aspect=crop", "data.flip=0.5"),
        ("data.flip=0.5", "data.jitter=0.2"),
        ("data.buckets=[1, 1.5]", "data.flip=0.5"),
        (*SUPER_RESOLUTION, "data.crop=4", "data.flip=0.5", "data.aspect=crop"),
    ],
    ids=["cropped", "moved", "buckets", "super-resolution"],
)
def test_a_mask_takes_every_cut_mirror_move_and_size_of_its_picture(tmp_path: Path, changes: tuple[str, ...]) -> None:
    config = micro_config(tmp_path / "run", masked(with_masks(tmp_path / "pictures")), *changes)
    seen = 0
    for _, batch in zip(range(6), batches(config.data, config.stage, 0, batch_size=4), strict=False):
        for place, mask in batch.masks.items():
            picture = batch.images[place, :1]
            assert mask.shape == picture.shape
            assert (255 - mask.int() - picture.int()).abs().max() <= 1
            seen += 1
        assert all(batch.captions[place] != "picture 3" for place in batch.masks)
    assert seen >= 4


def test_what_is_padded_around_a_picture_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("0", "0-masklabel"):
        Image.new("RGB", (16, 8), "white").save(folder / f"{name}.png")
    config = micro_config(tmp_path / "run", masked(folder))
    record = FolderRecords(config.data.sources[0])[0]
    mask = prepared(decode(record), record, config.data, config.stage, random.Random(0)).mask
    assert mask is not None
    assert mask[0, :, 0].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]


def test_masks_are_no_pictures_and_without_the_setting_they_are(tmp_path: Path) -> None:
    folder = with_masks(tmp_path / "pictures")
    config = micro_config(tmp_path / "run", masked(folder))
    source = config.data.sources[0]
    assert len(FolderRecords(source)) == 4
    assert len(FolderRecords(source.model_copy(update={"masks": False}))) == 7


def test_a_parquet_column_holds_masks_and_an_empty_cell_none(tmp_path: Path) -> None:
    folder = with_masks(tmp_path / "pictures")
    pictures = [{"bytes": (folder / f"{index}.png").read_bytes()} for index in range(4)]
    masks = [{"bytes": (folder / f"{index}-masklabel.png").read_bytes()} for index in range(3)]
    rows = {"image": pictures, "caption": [f"picture {index}" for index in range(4)], "mask": [*masks, None]}
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    source = f'{{kind: parquet, files: ["{tmp_path}/table.parquet"], mask_column: mask}}'
    config = micro_config(tmp_path / "run", f"data.sources=[{source}]", "data.aspect=crop")
    batch = next(iter(batches(config.data.model_copy(update={"caption_dropout": 0.0}), config.stage, 0, batch_size=8)))
    assert {batch.captions[place] for place in batch.masks} == {"picture 0", "picture 1", "picture 2"}
    assert all(torch.equal(255 - mask, batch.images[place, :1]) for place, mask in batch.masks.items())


def test_a_mask_of_another_size_is_a_bad_record_that_names_both(tmp_path: Path) -> None:
    folder = with_masks(tmp_path / "pictures")
    Image.new("L", (5, 5)).save(folder / "0-masklabel.png")
    config = micro_config(tmp_path / "run", masked(folder))
    record = FolderRecords(config.data.sources[0])[0]
    with pytest.raises(BadRecordError, match="its mask has 5x5, the picture 12x8; they must be equal"):
        prepared(decode(record), record, config.data, config.stage, random.Random(0))


def test_a_folder_without_masks_and_a_decoded_cache_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    config = micro_config(tmp_path / "run", masked(folder))
    with pytest.raises(CascadeError, match=r"masks: true, but no picture is called NAME-masklabel\.png"):
        FolderRecords(config.data.sources[0])
    with pytest.raises(CascadeError, match=r"data\.decoded stores pictures without their masks"):
        micro_config(tmp_path / "run", masked(folder), f"data.decoded={tmp_path}/decoded")
    held_out = masked(folder).replace("data.sources=", "training.validation={sources: ") + "}"
    with pytest.raises(CascadeError, match=r"data\.decoded stores pictures without their masks"):
        micro_config(tmp_path / "run", held_out, f"data.decoded={tmp_path}/decoded")


def test_a_black_mask_leaves_the_weights_where_they_are(tmp_path: Path) -> None:
    """With weight 0 nothing is learned, with weight 1 as much as without masks, in bits."""
    folder = with_masks(tmp_path / "pictures")
    plain = with_masks(tmp_path / "plain")
    for index in range(4):
        Image.new("L", (12, 8), 0).save(folder / f"{index}-masklabel.png")
        (plain / f"{index}-masklabel.png").unlink(missing_ok=True)
    cases = {
        "plain": (masked(plain).replace("masks: true", "masks: false"),),
        "0": (masked(folder),),
        "1": (masked(folder), "training.loss.unmasked_weight=1"),
    }
    ends = {}
    for name, changes in cases.items():
        run = trainer(micro_config(tmp_path / name, *changes, "training.steps=2"))
        start = {key: value.detach().clone() for key, value in run.stage.network.named_parameters()}
        assert run.run()
        ends[name] = {key: value.detach().clone() for key, value in run.stage.network.named_parameters()}
        assert any(not torch.equal(start[key], ends[name][key]) for key in start) == (name != "0")
    assert all(torch.equal(ends["plain"][key], ends["1"][key]) for key in ends["1"])
