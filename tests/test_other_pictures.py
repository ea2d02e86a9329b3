"""Cascades of other pictures than 8-bit RGB: drawn, written, drawn again, enlarged, edited, in their own values."""

from __future__ import annotations

import io
import json
import re
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from helpers_model import make_tiny_cascade, tiny_configs, tiny_stage
from helpers_training import micro_config, trainer
from PIL import Image
from reference import gaussian
from torch import nn

from cascade import CascadePipeline, Stage, StageConfig
from cascade.cli.program import main
from cascade.conditioning import Conditioning
from cascade.config.stage import read_stage_config
from cascade.config.training import TrainConfig
from cascade.data.loader import batches
from cascade.data.tars import TarRecords
from cascade.drawing.arguments import check_chain
from cascade.errors import CascadeError
from cascade.models.network import Network
from cascade.pictures.finish import Finish, chosen, limited, oklab, read_palette, repeated
from cascade.pictures.format import RGBA, PictureFormat
from cascade.pictures.rasters import read_stored
from cascade.resources.memory import StageCost
from cascade.settings import parse
from cascade.stage import build_schedule
from cascade.storage.training import with_measured_range

BANDS = ("blue", "green", "red", "nir")
KINDS: dict[str, dict[str, Any]] = {
    "gray": {"channels": "gray"},
    "gray16": {"channels": "gray", "values": "uint16"},
    "rgba": {"channels": "rgba"},
    "bands": {"channels": BANDS, "values": "uint16", "range": (0.0, 6000.0)},
    "height": {"channels": ("height",), "values": "float32", "range": (-100.0, 900.0)},
}


@dataclass(frozen=True)
class Done:
    """What a command printed, on both streams, and its exit status."""

    exit_code: int
    output: str


def run(*arguments: object) -> Done:
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        status = main([str(argument) for argument in arguments])
    return Done(status, text.getvalue())


def opened(path: Path) -> Image.Image:
    """The picture of a file, which is closed."""
    with Image.open(path) as image:
        return image.copy()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_cascade(folder / kind, **changes) for kind, changes in KINDS.items()}


def form_of(kind: str) -> PictureFormat:
    return tiny_configs(**KINDS[kind])[0].pictures


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_writes_the_values_of_the_data_and_the_same_bytes_again(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    out, form = tmp_path / "out", form_of(kind)
    more = ("--save-stages", "--grid")
    done = run("generate", "a red ring", "a", "--model", models[kind], "--out", out, "--seed", 3, *more)
    assert done.exit_code == 0, done.output
    ending = "png" if kind in ("gray", "gray16", "rgba") else "tif"
    (picture,) = out.glob("000000-*")
    assert picture.suffix == f".{ending}"
    stored = read_stored(picture, form)
    assert (stored.dtype, stored.shape) == (form.dtype, (form.channels, 32, 32))
    assert len(list((out / "stages").iterdir())) == 4
    assert opened(out / "grid.png").mode == "RGB"
    seed = json.loads((out / "manifest.jsonl").read_text().splitlines()[0])["seed"]
    drawn = CascadePipeline.from_pretrained(models[kind])("a red ring", seed=seed, output_type="np").images[0]
    assert np.array_equal(drawn, stored.permute(1, 2, 0).numpy())
    again = run("generate", "--from-image", picture, "--model", models[kind], "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()


def test_npy_holds_the_values_and_its_metadata_next_to_it(models: dict[str, Path], tmp_path: Path) -> None:
    done = run("generate", "a", "--model", models["height"], "--out", tmp_path, "--seed", 3, "--format", "npy")
    assert done.exit_code == 0, done.output
    values = np.load(tmp_path / "000000-a.npy")
    assert (values.dtype, values.shape) == (np.float32, (32, 32))
    again = run(
        "generate", "--from-image", tmp_path / "000000-a.npy", "--model", models["height"], "--out", tmp_path / "b"
    )
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bands", ("--format", "png"), "--format png: cannot hold 4 channels (blue, green, red, nir) of uint16"),
        ("rgba", ("--format", "jpeg"), "choose one of png, webp, tiff, npy, or give --background white"),
        ("gray", ("--background", "white"), "have no transparency; leave it out"),
        ("gray16", ("--palette", "4"), "palette: is for rgb and rgba of uint8"),
        ("rgba", ("--scale", "4"), "--scale N and --nearest belong together"),
        ("rgba", ("--palette", "300"), "expected 2 to 256 colours"),
        ("height", ("--format", "npy", "--html"), "a page cannot show npy files"),
    ],
)
def test_what_a_format_cannot_have_is_one_line(
    models: dict[str, Path], kind: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run("generate", "a", "--model", models[kind], "--out", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pil_pictures_of_bands_are_refused_before_drawing(models: dict[str, Path]) -> None:
    with pytest.raises(CascadeError, match=r'"pil" cannot hold 4 channels .* choose "np" or "pt"'):
        CascadePipeline.from_pretrained(models["bands"])("a")


def test_stages_of_other_pictures_do_not_chain() -> None:
    base, bands = tiny_configs()[0], tiny_configs(**KINDS["bands"])[1]
    with pytest.raises(CascadeError, match="stage sr16 enlarges pictures of 4 channels"):
        check_chain([base, bands], 32)


def test_cost_and_memory_follow_the_channels() -> None:
    """Weights of the first and last layer: 9 pixels x 8 features for each channel read or written, and a bias."""
    gray, rgba = (StageCost(tiny_configs(**KINDS[kind])[0]) for kind in ("gray", "rgba"))
    assert rgba.parameters - gray.parameters == 3 * (9 * 8 + 9 * 8 + 1)
    assert rgba.flops_per_call(4) > gray.flops_per_call(4)
    assert rgba.least_bytes((8, 8), torch.float32) > gray.least_bytes((8, 8), torch.float32)


# --- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["white", "checker"])
def test_a_background_is_what_the_transparent_picture_looks_like_over_it(
    models: dict[str, Path], background: str, tmp_path: Path
) -> None:
    for name in ("none", background):
        done = run(
            "generate", "a", "--model", models["rgba"], "--out", tmp_path / name, "--seed", 3, "--background", name
        )
        assert done.exit_code == 0, done.output
    through, flat = (opened(tmp_path / name / "000000-a.png") for name in ("none", background))
    assert (through.mode, flat.mode) == ("RGBA", "RGB")
    behind = np.full((32, 32, 1), 255.0)
    if background == "checker":
        rows, columns = np.mgrid[:32, :32] // 4
        behind[(rows + columns) % 2 == 1] = 204
    pixels = np.asarray(through).astype(float)
    share = pixels[..., 3:] / 255
    assert np.abs(pixels[..., :3] * share + behind * (1 - share) - np.asarray(flat)).max() <= 1
    again = run(
        "generate",
        "--from-image",
        tmp_path / background / "000000-a.png",
        "--model",
        models["rgba"],
        "--out",
        tmp_path / "b",
    )
    assert again.exit_code == 0, again.output


def test_webp_keeps_alpha(models: dict[str, Path], tmp_path: Path) -> None:
    run("generate", "a", "--model", models["rgba"], "--out", tmp_path, "--seed", 3, "--format", "webp")
    assert opened(tmp_path / "000000-a.webp").mode == "RGBA"


def soft(side: int) -> Image.Image:
    """A soft disc, stored as white where it is invisible."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    alpha = np.clip((0.35 - np.hypot(x, y)) * side / 2 + 0.5, 0, 1)[..., None]
    return Image.fromarray(
        np.concatenate((np.full((side, side, 3), 255), alpha * 255), axis=2).round().astype(np.uint8)
    )


def test_upscale_sees_no_hidden_colours(models: dict[str, Path]) -> None:
    """Two pictures that differ only where nothing is visible are enlarged to the same bytes."""
    one = soft(16)
    pixels = np.array(one)
    pixels[pixels[..., 3] == 0] = 0
    pipeline = CascadePipeline.from_pretrained(models["rgba"])
    first, second = (pipeline.upscale(image, seed=1).images[0] for image in (one, Image.fromarray(pixels)))
    assert first.mode == "RGBA"
    assert first.tobytes() == second.tobytes()


# --- enlarging and editing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_upscale_keeps_channels_and_values(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    form = form_of(kind)
    rng = np.random.default_rng(0)
    shape = (16, 16) if form.channels == 1 else (16, 16, form.channels)
    values = rng.uniform(0, 1, shape) * (form.limits[0][1] - form.limits[0][0]) + form.limits[0][0]
    file = tmp_path / ("a.png" if kind in ("gray", "gray16", "rgba") else "a.tif")
    if file.suffix == ".png":
        Image.fromarray(values.round().astype(form.values)).save(file)
    else:
        tifffile.imwrite(file, values.astype(form.values), photometric="minisblack")
    arguments = ("upscale", file, "--model", models[kind], "--out", tmp_path / "out")
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    stored = read_stored(tmp_path / "out" / file.name, form)
    assert (stored.dtype, stored.shape) == (form.dtype, (form.channels, 32, 32))
    assert "kept" in run(*arguments).output
    assert "another call" in run(*arguments, "--seed", 4).output


def test_a_picture_of_other_bands_cannot_be_enlarged(models: dict[str, Path], tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    done = run("upscale", tmp_path / "a.png", "--model", models["bands"], "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "a.png: has 3 channels of uint8; expected 4 channels (blue, green, red, nir) of uint16" in done.output


@pytest.mark.parametrize("kind", ["rgba", "bands"])
def test_outside_of_a_mask_every_value_stays(models: dict[str, Path], kind: str) -> None:
    form = form_of(kind)
    rng = torch.Generator().manual_seed(0)
    given = form.from_float(2 * torch.rand(form.channels, 32, 32, generator=rng) - 1).permute(1, 2, 0).numpy()
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:24] = True
    pipeline = CascadePipeline.from_pretrained(models[kind])
    drawn = pipeline("a", image=given, mask=mask, seed=1, output_type="np").images[0]
    assert np.array_equal(drawn[~mask], given[~mask])
    assert not np.array_equal(drawn[mask], given[mask])


# --- pixel art -------------------------------------------------------------------------------------------------------


def test_a_drawn_picture_is_enlarged_on_a_strict_grid_in_few_colours(models: dict[str, Path], tmp_path: Path) -> None:
    for name, more in {"plain": (), "art": ("--scale", 8, "--nearest", "--palette", 5)}.items():
        arguments = ("generate", "a", "--model", models["rgba"], "--out", tmp_path / name, "--seed", 3, *more)
        assert run(*arguments, "--until", 16).exit_code == 0
    plain, art = (np.asarray(opened(tmp_path / name / "000000-a.png")) for name in ("plain", "art"))
    assert art.shape == (128, 128, 4)
    blocks = art.reshape(16, 8, 16, 8, 4)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert np.array_equal(art[::8, ::8, 3], plain[..., 3])
    visible = art[art[..., 3] > 0]
    assert 2 <= len(np.unique(visible[:, :3], axis=0)) <= 5
    again = run(
        "generate",
        "--from-image",
        tmp_path / "art" / "000000-a.png",
        "--model",
        models["rgba"],
        "--out",
        tmp_path / "b",
    )
    assert "the same bytes" in again.output


def test_upscale_nearest_needs_no_model(tmp_path: Path) -> None:
    soft(16).save(tmp_path / "a.png")
    deep = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    done = run(
        "upscale", tmp_path / "a.png", tmp_path / "deep.png", "--scale", 3, "--nearest", "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    assert np.array_equal(np.asarray(opened(tmp_path / "out" / "a.png"))[1::3, 1::3], np.asarray(soft(16)))
    assert np.array_equal(np.asarray(opened(tmp_path / "out" / "deep.png"))[2::3, ::3], deep)
    wrong = run("upscale", tmp_path / "a.png", "--nearest", "--out", tmp_path / "out")
    assert "--scale N and --nearest belong together" in wrong.output


def test_oklab_is_that_of_its_author() -> None:
    """White, and the primaries, from the table in Ottosson (2020) and CSS Color 4."""
    found = oklab(np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]))
    expected = [[1, 0, 0], [0.628, 0.225, 0.126], [0.866, -0.234, 0.179], [0.452, -0.032, -0.312]]
    np.testing.assert_allclose(found, expected, atol=6e-4)


def test_a_palette_of_separate_clusters_is_their_means() -> None:
    """Four well separated colours with a little noise: k-means has one best answer."""
    rng = np.random.default_rng(0)
    centres = np.array([[30, 30, 200], [220, 40, 40], [60, 200, 60], [230, 220, 60]])
    pixels = (centres[rng.integers(0, 4, 4000)] + rng.integers(-6, 7, (4000, 3))).clip(0, 255).astype(np.uint8)
    found = chosen(pixels, 4)
    order = np.lexsort(centres.T[::-1])
    np.testing.assert_allclose(found, centres[order], atol=1)


def test_fewer_colours_than_the_palette_stay_as_they_are() -> None:
    picture = torch.randint(0, 2, (4, 9, 9), dtype=torch.uint8) * 255
    kept = limited(picture, 16)
    visible = picture[3] > 0
    assert torch.equal(kept[:, visible], picture[:, visible])
    assert torch.equal(kept[3], picture[3])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.hex", "ff0000\n0000ff\n"),
        ("a.gpl", "GIMP Palette\nName: two\n# a comment\n255 0 0 red\n  0   0 255\tblue\n"),
        ("a.pal", "JASC-PAL\n0100\n2\n255 0 0\n0 0 255\n"),
    ],
)
def test_palettes_of_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_palette(str(tmp_path / name)) == ("#ff0000", "#0000ff")
    picture = torch.tensor([250, 10, 20], dtype=torch.uint8).reshape(3, 1, 1)
    assert limited(picture, ("#ff0000", "#0000ff")).flatten().tolist() == [255, 0, 0]


def test_a_picture_is_a_palette_and_other_files_are_none(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_palette(str(tmp_path / "a.png")) == ("#010203",)
    (tmp_path / "b.hex").write_text("no colours")
    with pytest.raises(CascadeError, match=r"b.hex: has 0 colours; expected 1 to 256"):
        read_palette(str(tmp_path / "b.hex"))
    with pytest.raises(CascadeError, match="no such file"):
        read_palette(str(tmp_path / "c.png"))


def test_what_is_done_to_pictures_is_recorded_and_read_again() -> None:
    for finish in (Finish(), Finish(5, 8, "checker"), Finish(("#010203",))):
        assert Finish.of(json.loads(json.dumps(finish.described()))) == finish
    assert Finish().described() == {}
    for wrong in ({"scale": "8"}, {"scale": 0}, {"palette": 1}, {"palette": ["blue"]}, {"background": "green"}):
        with pytest.raises(CascadeError, match="expected"):
            Finish.of(wrong)
    assert repeated(torch.tensor([[[1, 2]]]).to(torch.uint16), 2).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2]]]


def test_stored_values_pass_between_stages_unchanged() -> None:
    """The second stage of a cascade sees what a file of the first stage's picture holds."""
    config = tiny_configs(**KINDS["rgba"])[0]
    stage = tiny_stage(config)
    assert stage.config.pictures == RGBA
    x = 2 * torch.rand(1, 4, 8, 8) - 1
    once = RGBA.from_float(x)
    assert torch.equal(RGBA.from_float(RGBA.to_float(once)), once)


# --- Gaussian data, whose best denoiser and flow are known ------------------------------------------------------------

MEANS, DEVIATIONS = (-0.3, 0.0, 0.1, 0.25, -0.15), (0.1, 0.2, 0.15, 0.05, 0.12)


class BestDenoiser(Network):
    """E[x | z] for channels that are independent Gaussians, each with its own mean and deviation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEANS[:channels], dtype=torch.float64)[:, None, None])
        self.std = nn.Parameter(torch.tensor(DEVIATIONS[:channels], dtype=torch.float64)[:, None, None])

    def prepare(self, cond: Conditioning) -> Conditioning:  # type: ignore[override]
        return cond

    def repeated_blocks(self) -> list[nn.Module]:
        return []

    def attention_layers(self) -> list[nn.Module]:
        return []

    def forward(self, z: torch.Tensor, log_snr: torch.Tensor, _cond: Conditioning) -> torch.Tensor:
        a = torch.sigmoid(log_snr.double())
        gain = a.sqrt() * self.std.square() / (a * self.std.square() + 1 - a)
        return self.mean + gain * (z - a.sqrt() * self.mean)


@pytest.mark.parametrize("channels", [1, 4, 5])
@torch.inference_mode()
def test_gaussian_data_of_any_channels_is_drawn_by_the_exact_flow(channels: int) -> None:
    """Each channel follows its own flow, with a quarter of the error at twice the steps (Heun); what is stored has the
    data's mean and deviation in its own units."""
    bands = tuple(f"band{number}" for number in range(channels))
    sampling = {"sampler": {"kind": "heun"}, "spacing": "log_snr", "threshold": None, "guidance": 1.0}
    config = parse(
        StageConfig,
        {
            **tiny_configs()[0].model_dump(mode="json"),
            **{"channels": bands, "values": "uint16", "range": [1000, 9000], "resolution": 64},
            "sampling": sampling,
        },
        "stage",
    )
    stage = Stage(config, BestDenoiser(channels), build_schedule(config.schedule, 64))
    cond = Conditioning(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool))
    z = torch.randn(1, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (64, 128):
        settings = config.sampling.model_copy(update={"steps": steps})
        drawn = stage.sample(cond, cond, z, [], settings)
        ends = torch.sigmoid(stage.noise_levels(settings)[[0, -1]].double()).tolist()
        exact = [
            gaussian.exact_flow(z[0, channel].double().numpy(), ends[0], ends[1], mean, std)
            for channel, mean, std in zip(range(channels), MEANS, DEVIATIONS, strict=False)
        ]
        errors.append(float(np.abs(drawn[0].numpy() - np.stack(exact)).max()))
    assert 3.5 < errors[0] / errors[1] < 4.6
    stored = config.pictures.from_float(drawn[0]).double()
    for channel in range(channels):
        # Of 4096 independent pixels: 4 standard errors of the mean, and of the deviation; 4000 is half the range.
        mean, std = 5000 + 4000 * MEANS[channel], 4000 * DEVIATIONS[channel]
        assert abs(stored[channel].mean() - mean) < 4 * std / 64 + 4000 * errors[1]
        assert abs(stored[channel].std() - std) < 4 * std / (64 * 2**0.5) + 4000 * errors[1]


# --- data ------------------------------------------------------------------------------------------------------------


def bands_settings(tmp_path: Path, *more: str) -> TrainConfig:
    source = f"data.sources=[{{kind: parquet, files: [{tmp_path}/bands.parquet]}}]"
    bands = ("stage.channels=[blue, green, red, nir]", "stage.values=uint16")
    return micro_config(tmp_path / "run", source, *bands, *more)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A Parquet file of four bands as nested lists: band b of picture p has the values 100 b .. 100 b + 63, plus p."""
    rows = []
    for number in range(4):
        ramp = np.arange(64).reshape(8, 8)
        values = np.stack([100 * band + ramp + number for band in range(4)], axis=-1)
        rows.append({"image": values.tolist(), "caption": f"field {number}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bands.parquet")
    return tmp_path


def test_parquet_columns_of_raw_arrays_are_pictures(table: Path) -> None:
    batch = next(iter(batches(bands_settings(table).data, bands_settings(table).stage, 0, batch_size=4)))
    assert (batch.images.dtype, batch.images.shape) == (torch.uint16, (4, 4, 8, 8))
    numbers = batch.images[:, 0, 0, 0].tolist()
    assert sorted(numbers) == [0, 1, 2, 3]
    assert batch.images[:, 3, 7, 7].tolist() == [363 + number for number in numbers]


def test_arrays_in_tar_shards_are_pictures_and_beside_a_picture_they_are_not(tmp_path: Path) -> None:
    def add(file: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))

    def array(values: np.ndarray[Any, Any]) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, values)
        return buffer.getvalue()

    with tarfile.open(tmp_path / "bands.tar", "w") as file:
        for number in range(4):
            add(file, f"{number}.npy", array(np.full((8, 8, 4), number, np.uint16)))
            add(file, f"{number}.txt", f"field {number}".encode())
    shards = f"data.sources=[{{kind: webdataset, files: ['{tmp_path}/bands.tar']}}]"
    config = bands_settings(tmp_path, shards)
    batch = next(iter(batches(config.data, config.stage, 0, batch_size=4)))
    assert sorted(batch.images[:, 3, 7, 7].tolist()) == [0, 1, 2, 3]

    png = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(png, "PNG")
    with tarfile.open(tmp_path / "beside.tar", "w") as file:
        for name, content in (("0.npy", array(np.zeros(512))), ("0.png", png.getvalue()), ("0.txt", b"red")):
            add(file, name, content)
    record = TarRecords([str(tmp_path / "beside.tar")], "txt", "caption")[0]
    assert record.image == png.getvalue()


def test_views_of_any_format_are_the_same_from_decoded_files_and_from_processes(table: Path) -> None:
    def views(*more: str) -> list[torch.Tensor]:
        config = bands_settings(table, "data.flip=0.5", "data.caption_dropout=0", *more)
        made = batches(config.data, config.stage, 0, batch_size=4)
        found = [next(made).images for _ in range(3)]
        made.close()
        return found

    plain = torch.stack(views())
    assert torch.equal(plain, torch.stack(views(f"data.decoded={table}/decoded")))
    assert torch.equal(plain, torch.stack(views("data.workers=1")))


def test_a_range_is_measured_once_and_kept_by_the_run(table: Path) -> None:
    """All values of band b are from 100 b to 100 b + 66; a resumed run keeps that when the data have changed."""
    first = with_measured_range(bands_settings(table, "stage.range={quantiles: [0, 1]}"))
    assert first.stage.range == ((0, 66), (100, 166), (200, 266), (300, 366))
    assert first.stage.pictures.limits == first.stage.range
    trainer(first.model_copy(update={"training": first.training.model_copy(update={"steps": 1})})).run()
    assert read_stage_config(table / "run" / "stage").range == first.stage.range
    rows = [{"image": np.full((8, 8, 4), 9).tolist(), "caption": "other"}]
    pq.write_table(pa.Table.from_pylist(rows), table / "bands.parquet")
    again = with_measured_range(bands_settings(table, "stage.range={quantiles: [0, 1]}"))
    assert again.stage.range == first.stage.range
    other = bands_settings(table, "stage.range={quantiles: [0, 1]}", f"output={table}/new")
    with pytest.raises(CascadeError, match="band blue has the value 9 almost everywhere"):
        with_measured_range(other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stage.channels=cmyk", "channels: 'cmyk' is not one of rgb, gray, rgba; bands are a list"),
        ("stage.channels=[a, a]", "two that are the same"),
        ("stage.values=float32", "values: float32 needs a range"),
        ("stage.range=[5, 5]", "range: 5 is not below 5"),
        ("stage.range=wide", "range: should be [low, high], one such pair for each channel, or {quantiles"),
        ("stage.range=[1, 2, 3]", "range: should be [low, high], one such pair"),
        ("stage.range=[1, high]", 'range.1: should be a valid number, not "high"'),
        ("stage.range=[[1, 2], [3]]", "range.1.1 is missing"),
        ("stage.range={quantile: [0, 1]}", "did you mean stage.range.quantiles?"),
        ("stage.range=[0, 70000]", "beyond values: uint16, 0 to 65535"),
        ("stage.range=[[0, 1], [0, 1]]", "range: 2 pairs for 4 channels"),
        ("stage.range={quantiles: [0.9, 0.1]}", "0.9 is not below 0.1"),
        ("data.sources=[{kind: scenes}]", "drawn scenes are rgb of uint8"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(CascadeError, match=re.escape(message)) as error:
        bands_settings(tmp_path, setting)
    assert "\n" not in str(error.value)
