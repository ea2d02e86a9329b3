"""The memory for drawing is computed before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers_model import make_tiny_cascade, tiny_configs
from helpers_text import make_tiny_t5

from cascade.cli.program import main
from cascade.config.stage import SquaredCosineSchedule, StageConfig
from cascade.models.if_unet import IFUNetConfig
from cascade.resources.memory import (
    OVERHEAD_BYTES,
    LiveBytes,
    TextMemory,
    Way,
    stage_memory,
    text_memory,
    ways,
    weight_bytes,
)


def test_the_peak_is_that_of_tensors_alive_at_the_same_time() -> None:
    with torch.device("meta"), LiveBytes() as live:
        first = torch.zeros(100)  # 400 bytes
        second = first + 1  # 800
        view = second[:10]  # a view costs nothing
        del first  # 400
        third = view.repeat(20)  # 1200
        del second, view, third
    assert (live.now, live.peak) == (0, 1200)


def as_asked(possible: Sequence[Way]) -> dict[tuple[str, bool, bool], int]:
    """Bytes by (dtype, low_memory, text_8bit), of what is not streamed."""
    return {(way.dtype, way.low_memory, way.text_8bit): way.bytes for way in possible if not way.streamed}


def test_low_memory_needs_the_largest_part_and_bfloat16_half() -> None:
    found = as_asked(ways(tiny_configs(), TextMemory(10**9, halved=True), 48))
    assert found["float32", False, False] > found["float32", True, False] > found["bfloat16", True, False]
    assert found["float32", True, False] - found["bfloat16", True, False] == 2 * 10**9


def test_8_bits_hold_the_linear_weights_of_the_text_encoder_in_a_byte_each() -> None:
    text = TextMemory(10**9, linear=750_000_000, rows=1_000_000, largest=10**8, halved=True)
    found = as_asked(ways(tiny_configs(), text, 48))
    assert found["float32", True, False] - found["float32", True, True] == 3 * 750_000_000 - 4_000_000
    assert found["bfloat16", True, False] - found["bfloat16", True, True] == 750_000_000 - 4_000_000
    assert found["bfloat16", False, False] - found["bfloat16", False, True] == 750_000_000 - 4_000_000


def test_a_way_that_spares_nothing_is_not_offered() -> None:
    (small, *_), text = tiny_configs(), TextMemory(1000, linear=750, halved=True)
    assert not any(way.text_8bit or way.streamed for way in ways([small], text, 48))


def test_streamed_only_the_largest_layer_is_in_memory() -> None:
    text = TextMemory(10**9, largest=10**8, halved=True)
    (streamed,) = [way for way in ways(tiny_configs(), text, 48) if way.streamed and way.dtype == "float32"]
    assert streamed.low_memory
    assert streamed.bytes == 4 * 10**8 + OVERHEAD_BYTES
    assert "read from disk" in streamed.description


def test_the_bytes_of_a_text_encoder_are_those_it_has(tmp_path: Path) -> None:
    from cascade.text.t5 import TextEncoder

    folder = make_tiny_t5(tmp_path / "t5", 64)
    counted = text_memory(folder, halved=True)
    for dtype in (torch.float32, torch.bfloat16):
        model = TextEncoder.from_pretrained(folder, dtype=dtype)._loaded()
        assert counted.bytes(dtype) == weight_bytes(model)
    assert counted.largest == max(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_text_encoder_in_8_bits_are_those_it_has(tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    from cascade.text.t5 import TextEncoder

    folder = make_tiny_t5(tmp_path / "t5", 64)
    model = TextEncoder.from_pretrained(folder, dtype=dtype, eight_bit=True)._loaded()
    scales = sum(4 * parameter.SCB.numel() for parameter in model.parameters() if hasattr(parameter, "SCB"))
    assert scales
    assert text_memory(folder, halved=True).bytes(dtype, eight_bit=True) == weight_bytes(model) + scales


def test_transformed_kernels_of_wide_convolutions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = StageConfig(
        name="base", resolution=64, schedule=SquaredCosineSchedule(), model=IFUNetConfig(blocks=(1, 1, 1, 1))
    )
    memory = stage_memory(config)
    assert 0 < memory.transformed["float32"] < 16 / 9 * memory.weights
    assert 0 < 2 * memory.transformed["bfloat16"] < memory.transformed["float32"]
    found = as_asked(ways([config], TextMemory(0), 77))
    for dtype in ("float32", "bfloat16"):
        assert found[dtype, False, False] - found[dtype, True, False] == memory.transformed[dtype]


def test_weights_are_counted_exactly() -> None:
    from cascade.resources.memory import count_parameters
    from cascade.stage import build_stage

    config = tiny_configs()[0]
    assert stage_memory(config).weights == 4 * count_parameters(build_stage(config).network)


@pytest.mark.parametrize(("free", "advice"), [(10**12, "fits with dtype='float32'"), (1, "no setting fits")])
def test_info_says_which_setting_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free: int, advice: str
) -> None:
    monkeypatch.setattr("cascade.system.device.free_bytes", lambda _device=None: free)
    assert main(["info", str(make_tiny_cascade(tmp_path / "tiny"))]) == 0
    assert advice in capsys.readouterr().out


def test_info_counts_the_stages_that_shall_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(make_tiny_cascade(tmp_path / "tiny"))
    assert main(["info", model, "--super-resolution", f"{model}/sr16", "--json"]) == 0
    assert [part["name"] for part in json.loads(capsys.readouterr().out)["parts"]] == ["text encoder", "base", "sr16"]


def test_a_way_says_what_to_write() -> None:
    assert Way("bfloat16", True, 1).arguments == "dtype='bfloat16', low_memory=True"
    assert Way("bfloat16", False, 1, text_8bit=True).arguments == "dtype='bfloat16', text_8bit=True"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_at_the_size_of_if_i_m_stays_within_the_estimate(dtype: str) -> None:
    """In a process of its own, whose largest size the system remembers; 372 million random weights."""
    script = textwrap.dedent(f"""
        import pathlib, resource, torch
        from cascade.stage import build_stage
        from cascade.conditioning import Conditioning
        from cascade.config.stage import SquaredCosineSchedule
        from cascade.config.sampling import SamplingConfig
        from cascade.config.stage import StageConfig
        from cascade.models.if_unet import IFUNetConfig
        sampling = SamplingConfig(sampler="ddpm", steps=1, guidance=7.0, variance="learned")
        config = StageConfig(
            name="base", resolution=64, schedule=SquaredCosineSchedule(), model=IFUNetConfig(), sampling=sampling
        )
        torch.set_default_dtype(torch.{dtype})
        stage = build_stage(config)
        torch.set_default_dtype(torch.float32)
        stage.network.eval().requires_grad_(False)
        text, mask = torch.randn(1, 77, 4096), torch.ones(1, 77, dtype=torch.bool)
        with torch.inference_mode():
            cond = Conditioning(text, mask)
            picture = stage.sample(cond, cond, torch.randn(1, 3, 64, 64), [torch.Generator()])
        assert picture.shape == (1, 3, 64, 64) and picture.isfinite().all()
        status = pathlib.Path("/proc/self/status")
        if status.exists():  # a child's ru_maxrss begins with the peak of the process that started it
            print(1024 * int(status.read_text().partition("VmHWM:")[2].split()[0]))
        else:
            print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    from cascade.config.sampling import SamplingConfig
    from cascade.config.stage import SquaredCosineSchedule, StageConfig
    from cascade.models.if_unet import IFUNetConfig

    config = StageConfig(
        name="base",
        resolution=64,
        schedule=SquaredCosineSchedule(),
        model=IFUNetConfig(),
        sampling=SamplingConfig(guidance=7.0),
    )
    estimate = as_asked(ways([config], TextMemory(0), 77))[dtype, False, False]
    used = int(done.stdout)
    assert 0.6 * estimate < used < estimate
