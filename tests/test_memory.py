"""The memory that drawing takes is known before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers_model import make_tiny_cascade, tiny_configs

from cascade.cli import main
from cascade.config import IFUNetConfig, SquaredCosineSchedule, StageConfig
from cascade.memory import LiveBytes, Way, stage_memory, ways


def test_the_peak_is_that_of_tensors_alive_at_the_same_time() -> None:
    with torch.device("meta"), LiveBytes() as live:
        first = torch.zeros(100)  # 400 bytes
        second = first + 1  # 800
        view = second[:10]  # a view costs nothing
        del first  # 400
        third = view.repeat(20)  # 1200
        del second, view, third
    assert (live.now, live.peak) == (0, 1200)


def test_low_memory_needs_the_largest_part_and_bfloat16_half() -> None:
    configs = tiny_configs()
    found = {(way.dtype, way.low_memory): way.bytes for way in ways(configs, 10**9, 48, halved_text=True)}
    assert found["float32", False] > found["float32", True] > found["bfloat16", True]
    assert found["float32", True] - found["bfloat16", True] == 2 * 10**9


def test_what_wide_convolutions_hold_beside_their_weights_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = StageConfig(
        name="base", resolution=64, schedule=SquaredCosineSchedule(), model=IFUNetConfig(blocks=(1, 1, 1, 1))
    )
    memory = stage_memory(config)
    assert 0 < memory.transformed < 16 / 9 * memory.weights
    found = {(way.dtype, way.low_memory): way.bytes for way in ways([config], 0, 77, halved_text=True)}
    assert found["float32", False] - found["float32", True] == memory.transformed


def test_weights_are_counted_exactly() -> None:
    from cascade.build import build_stage
    from cascade.stage import count_parameters

    config = tiny_configs()[0]
    assert stage_memory(config).weights == 4 * count_parameters(build_stage(config).network)


@pytest.mark.parametrize(("free", "advice"), [(10**12, "fits with dtype='float32'"), (1, "no setting fits")])
def test_info_says_which_setting_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free: int, advice: str
) -> None:
    monkeypatch.setattr("cascade.memory.free_bytes", lambda: free)
    assert main(["info", str(make_tiny_cascade(tmp_path / "tiny"))]) == 0
    assert advice in capsys.readouterr().out


def test_a_way_says_what_to_write() -> None:
    assert Way("bfloat16", True, 1).arguments == "dtype='bfloat16', low_memory=True"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_at_the_size_of_if_i_m_stays_within_the_estimate(dtype: str) -> None:
    """In a process of its own, whose largest size the system remembers; 372 million random weights."""
    script = textwrap.dedent(f"""
        import resource, torch
        from cascade.build import build_stage
        from cascade.conditioning import Conditioning
        from cascade.config import IFUNetConfig, SamplingConfig, SquaredCosineSchedule, StageConfig
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
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    from cascade.config import IFUNetConfig, SamplingConfig, SquaredCosineSchedule, StageConfig

    config = StageConfig(
        name="base",
        resolution=64,
        schedule=SquaredCosineSchedule(),
        model=IFUNetConfig(),
        sampling=SamplingConfig(guidance=7.0),
    )
    (estimate,) = [way.bytes for way in ways([config], 0, 77, True) if way.dtype == dtype and not way.low_memory]
    used = int(done.stdout)
    assert 0.6 * estimate < used < estimate
