"""Ray Data draws what the pipeline draws, however the dataset is cut."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from helpers_model import make_tiny_cascade
from PIL import Image

import cascade
from cascade import CascadePipeline
from cascade.seeds import derive_seed


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # ray's own
def test_two_actors_draw_what_the_pipeline_draws(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    from cascade.integrations.ray import generate

    model = make_tiny_cascade(tmp_path / "tiny")
    rows = [{"prompt": f"a fox in picture {number}", "id": str(number)} for number in range(8)]
    here = str(Path(cascade.__file__).parents[1])
    # Two actors on two cores would starve the readers: a local cluster declares more than there are.
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}},
    )
    try:
        dataset = ray.data.from_items([*rows, {"prompt": "a star", "id": "8"}]).repartition(3)
        drawn = generate(dataset, model=str(model), seed=7, concurrency=2, batch_size=2, device="cpu", until=8)
        results = {row["id"]: row for row in drawn.take_all()}
    finally:
        ray.shutdown()
    assert len(results) == 9
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    for identifier, row in results.items():
        assert (row["seed"], row["error"]) == (derive_seed(7, "id", identifier), "")
        expected = pipeline(row["prompt"], seed=row["seed"], until=8).images[0]
        assert Image.open(io.BytesIO(row["image"])).tobytes() == expected.tobytes()
