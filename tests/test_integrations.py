"""Ray Data draws the pipeline's pictures for any partition of the dataset; the Slurm script resumes after its end."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers_model import make_tiny_cascade
from PIL import Image

import cascade
from cascade import CascadeError, CascadePipeline
from cascade.batch.metadata import read_metadata
from cascade.cli.program import main
from cascade.integrations.ray import Drawer, draw_options
from cascade.prompts.reading import read_prompts
from cascade.prompts.records import PromptRecord
from cascade.seeds import derive_seed

UNTIL = 8
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model, device="cpu")


def drawn(model: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """What an actor makes of rows."""
    drawer = Drawer(str(model), {"device": "cpu"}, draw_options(7, {"until": UNTIL, **options}))
    names = dict.fromkeys(name for row in rows for name in row)
    return drawer(pa.table({name: [row.get(name) for row in rows] for name in names})).to_pylist()


def pixels(content: bytes) -> bytes:
    return Image.open(io.BytesIO(content)).tobytes()


# --- what an actor does ------------------------------------------------------------------------------------


def test_a_row_says_what_a_line_of_a_prompt_file_may(model: Path, pipeline: CascadePipeline) -> None:
    rows = [
        {"prompt": "a fox", "url": "kept", "image": b"replaced"},
        {"prompt": "a star", "seed": 5, "num_images": 2, "negative_prompt": "dull", "guidance": {"base": 3.0}},
        {"prompt": "a", "id": "x", "steps": 1},
    ]
    fox, star, second, a = drawn(model, rows, num_images_per_prompt=1, negative_prompt="red")
    assert (fox["seed"], fox["number"], fox["url"], fox["error"]) == (
        derive_seed(7, "text", "a fox", 0),
        0,
        "kept",
        None,
    )
    assert [(row["prompt"], row["seed"], row["number"], row["url"]) for row in (star, second)] == [
        ("a star", 5, 0, None),
        ("a star", 5, 1, None),
    ]
    assert a["seed"] == derive_seed(7, "id", "x")
    (expected,) = pipeline("a fox", seed=fox["seed"], negative_prompt="red", until=UNTIL).images
    assert pixels(fox["image"]) == expected.tobytes()
    images = pipeline(
        "a star", seed=5, negative_prompt="dull", guidance={"base": 3.0}, num_images_per_prompt=2, until=UNTIL
    ).images
    assert [pixels(row["image"]) for row in (star, second)] == [image.tobytes() for image in images]
    (expected,) = pipeline("a", seed=a["seed"], negative_prompt="red", steps=1, until=UNTIL).images
    assert pixels(a["image"]) == expected.tobytes()


def test_a_row_that_cannot_be_drawn_says_why_and_the_others_go_on(model: Path) -> None:
    rows = [
        {"prompt": None},
        {"prompt": "a", "seed": -1},
        {"prompt": "a", "steps": {"bse": 2}},
        {"prompt": "a fox", "seed": 3},
    ]
    *bad, good = drawn(model, rows)
    assert [(row["image"], row["error"].partition(";")[0]) for row in bad] == [
        (None, "prompt is missing"),
        (None, "seed: expected a whole number in 0..9223372036854775807, found -1"),
        (None, "steps: no stage is called 'bse'"),
    ]
    assert good["error"] is None


def test_a_picture_that_is_not_finite_has_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade.drawing.batches import draw_batch

    monkeypatch.setattr(
        "cascade.drawing.engine.draw_batch", lambda *values, **more: float("nan") * draw_batch(*values, **more)
    )
    (row,) = drawn(model, [{"prompt": "a", "seed": 3}])
    assert (row["seed"], row["number"], row["image"]) == (3, 0, None)
    assert "not finite" in row["error"]


def test_rows_that_repeat_a_text_get_equal_pictures_unless_they_say_more(model: Path) -> None:
    """A dataset has no order, so none of them is the first."""
    same, again, named = drawn(model, [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "id": "x"}])
    assert same["image"] == again["image"] != named["image"]
    first, second = drawn(model, [{"prompt": "a", "num_images": 2}])
    assert first["seed"] == second["seed"] == same["seed"]
    assert pixels(first["image"]) == pixels(same["image"]) != pixels(second["image"])


def test_a_dataset_and_a_prompt_file_give_the_same_seeds(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a fox"\n{"prompt": "b", "id": 7}\n{"prompt": "c", "seed": 1}\n')
    records = [record for record in read_prompts(str(tmp_path / "p.jsonl"), 7) if isinstance(record, PromptRecord)]
    rows = drawn(model, [{"prompt": "a fox"}, {"prompt": "b", "id": 7}, {"prompt": "c", "seed": 1}])
    assert [row["seed"] for row in rows] == [record.seed for record in records]


def test_neither_the_cut_nor_the_batch_at_hand_changes_a_picture(model: Path) -> None:
    rows = [{"prompt": f"a fox in picture {number}"} for number in range(5)]
    whole = drawn(model, rows, batch_size=2)
    parts = [row for part in (rows[:1], rows[1:4], rows[4:]) for row in drawn(model, part, batch_size=2)]
    assert whole == parts


def test_a_picture_tells_what_drew_it_and_is_drawn_again(model: Path, tmp_path: Path) -> None:
    (row,) = drawn(model, [{"prompt": "ключ 🦊", "id": "key"}])
    (tmp_path / "key.png").write_bytes(row["image"])
    assert read_metadata(tmp_path / "key.png")[0]["prompt"] == "ключ 🦊"
    call = ["generate", "--from-image", str(tmp_path / "key.png"), "--model", str(model), "--out", str(tmp_path / "o")]
    assert main(call) == 0


def test_wrong_options_are_told_before_anything_is_drawn(model: Path) -> None:
    with pytest.raises(CascadeError, match="'untill' is not an option; did you mean until"):
        draw_options(0, {"untill": 8})
    with pytest.raises(CascadeError, match="until: no stage draws 7 px"):
        drawn(model, [], until=7)
    with pytest.raises(CascadeError, match="steps: no stage is called 'bse'"):
        drawn(model, [], steps={"bse": 2})


# --- a cluster of two actors -------------------------------------------------------------------------------


@pytest.fixture
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    here = str(Path(cascade.__file__).parents[1])
    environment = {
        "PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # a busy machine starts processes slowly
    }
    # Two actors on two cores would starve the readers: a local cluster declares more than there are.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    yield ray
    ray.shutdown()


class Telling(Drawer):
    """Says which process drew, and leaves the other one time to take its share."""

    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(0.5)
        result = super().__call__(table)
        return result.append_column("process", pa.array([os.getpid()] * len(result)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # ray's own
def test_two_actors_draw_what_the_pipeline_draws(
    ray: Any, model: Path, pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.integrations.ray import generate

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))  # actors cannot import a test
    monkeypatch.setattr("cascade.integrations.ray.Drawer", Telling)
    rows = [{"prompt": f"a fox in picture {number}", "id": str(number), "num_images": 1} for number in range(8)]
    rows += [{"prompt": "a star", "id": "8", "num_images": 2}, {"prompt": "", "id": "9", "num_images": 1}]
    dataset = ray.data.from_items(rows).repartition(5)
    with pytest.raises(CascadeError, match="the dataset has no column `prompt`; it has id, num_images"):
        generate(dataset.drop_columns(["prompt"]).materialize())
    pictures = generate(dataset, model=str(model), seed=7, concurrency=2, rows=2, device="cpu", until=UNTIL)
    results = {(row["id"], row["number"]): row for row in pictures.take_all()}
    assert len({row["process"] for row in results.values()}) == 2
    assert results.pop(("9", None))["error"] == "prompt is missing"
    assert len(results) == 10
    for (identifier, number), row in results.items():
        assert (row["seed"], row["error"]) == (derive_seed(7, "id", identifier), None)
        expected = pipeline(row["prompt"], seed=row["seed"], num_images_per_prompt=number + 1, until=UNTIL).images[-1]
        assert pixels(row["image"]) == expected.tobytes()


# --- Slurm -------------------------------------------------------------------------------------------------


def slurm(folder: Path, cascade: str) -> subprocess.Popen[bytes]:
    """The script of docs/batch.md as task 3 of array 7, with stand-ins for Slurm's command and ours."""
    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    script = "#!/bin/bash\n" + text.partition("#!/bin/bash\n")[2].partition("```")[0]
    for name, body in {"job": script, "cascade": f"#!/bin/bash\n{cascade}\n", "scontrol": LOG}.items():
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "7"}
    environment = {**os.environ, **task, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log")}
    return subprocess.Popen([folder / "job"], env=environment)


LOG = '#!/bin/bash\necho "${0##*/} $*" >> "$LOG"\n'


def test_a_task_of_the_slurm_script_that_meets_its_limit_stops_and_is_queued_again(tmp_path: Path) -> None:
    waits = 'trap \'echo stopped >> "$LOG"; exit 1\' TERM; sleep 0.2; touch "$LOG"; while :; do sleep 0.02; done'
    job = slurm(tmp_path, waits)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=10)
    assert (tmp_path / "log").read_text().splitlines() == ["stopped", "scontrol requeue 7_3"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_task_of_the_slurm_script_that_ends_says_how(tmp_path: Path, status: int) -> None:
    job = slurm(tmp_path, f'echo "$*" >> "$LOG"; exit {status}')
    assert job.wait(timeout=10) == status
    (call,) = (tmp_path / "log").read_text().splitlines()
    assert call.endswith("--shard 3/16")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("default")  # ray's own
def test_two_replicas_of_ray_serve_answer_one_address_with_the_pipelines_pictures(
    model: Path, pipeline: CascadePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = pytest.importorskip("ray.serve")
    import openai

    from cascade.integrations.ray_serve import app

    monkeypatch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(app({"model": str(model), "out": str(tmp_path), "min_replicas": "2", "max_replicas": "2"}))
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:

            def drawn(seed: int) -> bytes:
                answer = client.images.generate(prompt="a fox", size="32x32", extra_body={"seed": seed})
                (datum,) = answer.data or []
                return Image.open(io.BytesIO(base64.b64decode(datum.b64_json or ""))).tobytes()

            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(drawn, range(12)))
            with pytest.raises(openai.BadRequestError, match="expected b64_json"):
                client.images.generate(prompt="a fox", response_format="url")
        expected = [pipeline("a fox", seed=seed).images[0].tobytes() for seed in range(12)]
        assert found == expected
        assert sum(any((folder / "studio").glob("*.png")) for folder in tmp_path.iterdir()) == 2
    finally:
        serve.shutdown()
