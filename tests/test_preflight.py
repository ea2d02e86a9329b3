"""Wrong settings of a training run are found before its first step, with a one-line error that names the way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_text import make_tiny_t5
from helpers_training import SUPER_RESOLUTION, WordEncoder, micro_config, micro_settings, trainer, write_pictures
from PIL import Image
from safetensors.torch import load_file

from cascade.cli.program import main
from cascade.errors import CascadeError
from cascade.files.atomic import write_text
from cascade.resources.memory import LiveBytes, weight_bytes
from cascade.settings import override, parse, to_yaml
from cascade.text.t5 import TextEncoder
from cascade.training.memory import TrainingMemory, check_memory, check_run, run_bytes, training_memory

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Case:
    """A wrong run: changes of the micro run, words of the error, and what must be arranged first."""

    name: str
    changes: tuple[str, ...]
    message: str
    arrange: Callable[[Path, Patch], object] = lambda _folder, _patch: None


def table_without_captions(folder: Path, _patch: Patch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"picture": [b""], "label": [3], "url": ["a"]}), folder / "table.parquet")


def metadata_without_captions(folder: Path, _patch: Patch) -> None:
    pictures = write_pictures(folder / "pictures", {"red": Image.new("RGB", (8, 8), "red")})
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "words": "red", "size": 3}\n')


def small_tiles(folder: Path, _patch: Patch) -> None:
    write_pictures(folder / "pictures", {"red": Image.new("RGB", (4, 4), "red")})


def free_disk(size: float) -> Callable[[Path, Patch], object]:
    usage = shutil._ntuple_diskusage(10**12, 10**12, int(size))  # type: ignore[attr-defined]
    return lambda _folder, patch: patch.setattr(shutil, "disk_usage", lambda _path: usage)


def free_memory(size: float) -> Callable[[Path, Patch], object]:
    return lambda _folder, patch: patch.setattr("cascade.training.memory.free_bytes", lambda: int(size))


def memory_for_half_a_batch(folder: Path, patch: Patch) -> None:
    memory = training_memory(micro_config(folder))
    free_memory(memory.weights + 0.6 * memory.activations)(folder, patch)


def memory_without_text(folder: Path, patch: Patch) -> None:
    free_memory(training_memory(micro_config(folder)).total)(folder, patch)


def three_processes(_folder: Path, patch: Patch) -> None:
    from accelerate import Accelerator

    patch.setattr(Accelerator, "num_processes", property(lambda _self: 3))


LR = "training.optimizer."
FOLDER = "data.sources=[{kind: folder, path: FOLDER/pictures}]"
CASES = [
    Case(
        "resolution does not divide",
        ("stage.model.patch=3",),
        "stage: resolution 8 is not a multiple of 3, the factor by which the model reduces it",
    ),
    Case(
        "low resolution does not divide",
        ("stage.low_resolution=3",),
        "resolution 8 is not a multiple of low_resolution 3",
    ),
    Case("crop does not divide", (*SUPER_RESOLUTION, "data.crop=5"), "data.crop 5 must be a multiple of 2"),
    Case("groups do not divide", ("stage.model.groups=3",), "groups 3 does not divide 8 channels"),
    Case("heads do not divide", ("stage.model.head_dim=3",), "head_dim 3 does not divide the 8 channels that attend"),
    Case(
        "accumulation does not divide", ("training.accumulation=3",), "batch_size 4 is not a multiple of accumulation 3"
    ),
    Case(
        "processes do not divide",
        (),
        "training.batch_size / training.accumulation = 4 does not divide among 3 processes",
        three_processes,
    ),
    Case(
        "crop larger than the stage",
        (*SUPER_RESOLUTION, "data.crop=16"),
        "data.crop 16 is larger than stage.resolution 8",
    ),
    Case(
        "crop larger than the tiles",
        (*SUPER_RESOLUTION, "data.crop=8", "data.tiles=true", FOLDER),
        "the tile of 4x4 is smaller than data.crop 8",
        small_tiles,
    ),
    Case(
        "schedule longer than the run",
        (LR + "warmup_steps=3", LR + "decay=linear", LR + "decay_steps=2"),
        "warmup_steps + decay_steps = 5 is longer than the run of 4 steps",
    ),
    Case(
        "no captions column in a table",
        ('data.sources=[{kind: parquet, files: ["FOLDER/table.parquet"], image_column: picture}]',),
        "no column 'caption'; the columns are picture, label, url",
        table_without_captions,
    ),
    Case(
        "no captions column in metadata",
        (FOLDER,),
        "no column 'caption'; the columns are file_name, size, words",
        metadata_without_captions,
    ),
    Case(
        "no captions column in held-out data",
        ('training.validation={sources: [{kind: parquet, files: ["FOLDER/table.parquet"], image_column: picture}]}',),
        "no column 'caption'; the columns are picture, label, url",
        table_without_captions,
    ),
    Case(
        "too little disk",
        ("training.keep_checkpoints=5",),
        "output: 5 checkpoints and one being written need 0.00 GB, ",
        free_disk(1000),
    ),
    Case(
        "too little memory, smaller passes fit",
        ("text.encoder=bundled",),
        "set training.accumulation=2, which computes the same steps in smaller passes",
        memory_for_half_a_batch,
    ),
    Case(
        "too little memory for the text encoder as well",
        (),
        "so that the encoder is not loaded",
        memory_without_text,
    ),
    Case("too little memory, hopeless", (), "use a smaller stage.model, or FSDP over several GPUs", free_memory(1000)),
    Case(
        "a part that is not there",
        ("training.frozen=[levles.0]",),
        "training.frozen: 'levles.0' matches no weight; did you mean levels.0",
    ),
    Case("weights that are not there", ("training.init_from=FOLDER/nothing",), "FOLDER/nothing"),
]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("text") / "t5", dim=16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_run_ends_before_its_first_step(
    case: Case, tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    case.arrange(tmp_path, monkeypatch)
    settings = override(micro_settings(tmp_path / "run"), [f"text.encoder={t5}", "text.max_length=200"])
    write_text(tmp_path / "run.yaml", to_yaml(parse(type(micro_config(tmp_path)), settings, "micro")))
    changes = [change.replace("FOLDER", str(tmp_path)) for change in case.changes]
    assert main(["train", str(tmp_path / "run.yaml"), *changes]) == 2
    error = capsys.readouterr().err
    assert case.message.replace("FOLDER", str(tmp_path)) in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    log = tmp_path / "run" / "log.jsonl"
    assert not log.exists() or log.read_text() == ""


@pytest.mark.parametrize(
    "changes",
    [(), ("training.frozen=[levels]",), ("training.lora_rank=2",), ("training.optimizer.kind=adafactor",)],
    ids=["plain", "frozen", "lora", "adafactor"],
)
def test_required_disk_space_is_that_of_a_finished_run_and_one_checkpoint(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    """With all kept checkpoints there: theirs and the stage's tensors, and those of one more being written."""
    config = micro_config(tmp_path / "run", "training.save_every=1", "training.keep_checkpoints=3", *changes)
    assert trainer(config).run()
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(folders) == 3
    stage, adapter = (tensor_bytes(tmp_path / "run" / name) for name in ("stage", "adapter"))
    assert (adapter > 0) == ("training.lora_rank=2" in changes)
    held = 4 * tensor_bytes(folders[-1]) + 2 * (stage + adapter)
    # A few numbers more: the optimizer's step counts; and the stage is smaller by what is merged into it.
    assert run_bytes(config) == pytest.approx(held, rel=0.02)


def tensor_bytes(folder: Path) -> int:
    """Of the weights in a folder, without the files' headers, which are long beside weights as few as these."""
    tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_the_activations_of_a_step_are_those_that_a_true_one_makes(tmp_path: Path) -> None:
    """Counted without data for 4 pictures, and measured in a pass of 8 less one of 4 on true tensors."""
    config = micro_config(tmp_path / "run", "text.max_length=6", "text.padded=true")
    peaks = {}
    for pictures in (4, 8):
        run = trainer(micro_config(tmp_path / "run", f"training.batch_size={pictures}"), FixedEncoder())
        batch = next(run._batches(0))
        with LiveBytes() as live:
            run.objective(run.stage, run.network, run.ready(batch))[0].mean().backward()
        peaks[pictures] = live.peak
    counted = training_memory(config).activations
    assert counted == pytest.approx(peaks[8] - peaks[4], rel=0.15)  # the loss itself is not counted


def test_activations_that_are_computed_again_are_not_counted(tmp_path: Path) -> None:
    """With attention, of which the estimate has a kind of its own."""
    kept, again = (
        training_memory(micro_config(tmp_path / "run", f"training.activation_checkpointing={value}")).activations
        for value in ("false", "true")
    )
    assert 0 < again < kept


def test_weights_and_all_that_belongs_to_them_are_shared_out_under_fsdp(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run")
    weights = weight_bytes(trainer(config).stage.network)
    assert training_memory(config).weights == 5 * weights  # gradient, average, and AdamW's two
    assert training_memory(config, processes=2, sharded=True).weights == 5 * weights // 2
    assert training_memory(config, processes=2).activations == training_memory(config).activations // 2


def test_processes_of_a_machine_share_its_memory(tmp_path: Path, monkeypatch: Patch) -> None:
    """Each takes 60 % of it: one alone fits, two do not; on GPUs each has its own."""
    config = micro_config(tmp_path / "run", "training.batch_size=8")
    free_memory(training_memory(config, processes=2).total / 0.6)(tmp_path, monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_run(config, processes=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(CascadeError, match="a step needs at least"):
        check_run(config, processes=2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_run(config, processes=2)


def test_the_text_encoder_is_counted_where_it_will_be_loaded(tmp_path: Path, t5: Path) -> None:
    def text_bytes(*changes: str) -> int:
        return training_memory(micro_config(tmp_path / "run", *changes)).text

    whole = text_bytes(f"text.encoder={t5}")
    assert whole == weight_bytes(TextEncoder.from_pretrained(t5)._loaded())
    assert text_bytes(f"text.encoder={t5}", "text.dtype=bfloat16") == whole // 2
    cached = (f"text.encoder={t5}", f"text.cache={tmp_path}")
    assert text_bytes(*cached) == whole, "there is no cache yet"
    write_text(tmp_path / "index.json", "{}")
    assert text_bytes(*cached) == 0


def test_a_run_that_just_fits_is_accepted(tmp_path: Path) -> None:
    check_memory(micro_config(tmp_path), TrainingMemory(600, 400), free=1000)


class FixedEncoder(WordEncoder):
    """Six tokens for every caption, as many as are counted."""

    def encode(self, prompts: list[str], batch_size: int = 1):  # type: ignore[no-untyped-def, override]
        return super().encode(["a b c d e" for _ in prompts], batch_size)


def test_torch_counts_nothing_while_it_is_not_asked_to() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(10)
    torch.zeros(1000)
    assert live.peak == kept.nbytes
