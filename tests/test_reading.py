"""A stage's folder records its text settings in training, and a program that loads the stage uses them, or refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers_model import TEXT_DIM, tiny_configs, tiny_stage
from helpers_text import make_tiny_t5
from helpers_training import micro_settings

from cascade import CascadePipeline
from cascade.cli.program import main
from cascade.config.data import TextReading
from cascade.config.stage import save_stage
from cascade.errors import CascadeError
from cascade.storage.diffusers import READING as IF_READING
from cascade.storage.index import read_index
from cascade.storage.pipeline import assemble, load_encoder
from cascade.storage.stage import read_reading
from cascade.storage.training import load_train_config, load_trainer

PADDED = TextReading(max_length=150, padded=True, captions="deepfloyd")
ZEROS = TextReading(max_length=150, null_text="zeros")
TERMS = {"name": "mine", "license": "CC0-1.0"}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("reading") / "t5", TEXT_DIM)


def write_stages(folder: Path, *readings: TextReading | None) -> list[Path]:
    """The first stages of the tiny cascade, each in a folder that says (unless None) how its text was read."""
    configs, folders = tiny_configs()[: len(readings)], []
    for config, reading in zip(configs, readings, strict=True):
        folders.append(folder / config.name)
        save_stage(folders[-1], config, tiny_stage(config).network.state_dict(), reading=reading)
    return folders


def train(tmp_path: Path, t5: Path, **text: object) -> Path:
    """A run of one step by the command; its folder."""
    settings = micro_settings(tmp_path / "run") | {"text": {"encoder": str(t5), **text}}
    settings["stage"]["model"]["text_dim"] = TEXT_DIM
    settings["training"]["steps"] = 1
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    return tmp_path / "run"


# --- assemble ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["by this version", "by an earlier one"])
def test_the_assembled_cascade_reads_text_as_the_training_run_did(tmp_path: Path, t5: Path, written: str) -> None:
    """Length, padding and cleaning; a run of an earlier version says it in its config.yaml alone."""
    run = train(tmp_path, t5, **PADDED.model_dump())
    stage = run / "stage" / "stage.json"
    settings = json.loads(stage.read_text())
    assert settings.pop("text") == PADDED.model_dump()
    if written == "by an earlier one":
        stage.write_text(json.dumps(settings))
    parts = ["--text-encoder", t5, "--stage", run, "--out", tmp_path / "model", "--name", "m", "--license", "CC0-1.0"]
    assert main(["assemble", *map(str, parts)]) == 0
    assert read_index(tmp_path / "model").reading == PADDED
    encoder = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu").text_encoder
    assert encoder.encode(["A RED circle"]).tokens.shape[1] == 150
    assert read_reading(tmp_path / "model" / "base") == PADDED


def test_zeros_as_null_text_go_from_the_run_into_the_cascade_and_its_pipeline(tmp_path: Path, t5: Path) -> None:
    run = train(tmp_path, t5, **ZEROS.model_dump())
    assert read_reading(run / "stage") == ZEROS
    assemble(t5, [run], **TERMS).save_pretrained(tmp_path / "model")
    assert read_index(tmp_path / "model").reading == ZEROS
    encoder = CascadePipeline.from_pretrained(tmp_path / "model", device="cpu").text_encoder
    assert not encoder.encode([""]).tokens.any()
    with pytest.raises(CascadeError, match="null_text=encoded"):
        assemble(t5, [run, *write_stages(tmp_path, None, TextReading(max_length=150))[1:]], **TERMS)


def test_pictures_of_an_assembled_cascade_are_those_of_the_cascade_its_stages_come_from(
    tmp_path: Path, t5: Path
) -> None:
    """Also where only cascade.json says how text is read, as in folders of earlier versions."""
    own = assemble(t5, write_stages(tmp_path, PADDED, PADDED), **TERMS)
    own.save_pretrained(tmp_path / "own")
    for name in ("base", "sr16"):
        path = tmp_path / "own" / name / "stage.json"
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "text"})
        )
    again = assemble(t5, [tmp_path / "own" / "base", tmp_path / "own" / "sr16"], **TERMS)
    plain = assemble(t5, write_stages(tmp_path / "plain", TextReading(), TextReading()), **TERMS)
    first, second, third = (pipeline("A RED fox", seed=1, output_type="pt").images for pipeline in (own, again, plain))
    assert torch.equal(first, second)
    assert not torch.equal(first, third), "how text is read makes a difference to these pictures"


def test_stages_whose_text_was_read_in_different_ways_are_refused(tmp_path: Path, t5: Path) -> None:
    stages = write_stages(tmp_path, TextReading(max_length=150, captions="lower"), PADDED)
    with pytest.raises(CascadeError, match=r"base is read with padded=false, captions=lower, .*sr16 with padded=true"):
        assemble(t5, stages, **TERMS)


def test_stages_that_differ_in_length_alone_leave_the_choice_to_the_caller(tmp_path: Path, t5: Path) -> None:
    stages = write_stages(tmp_path, TextReading(max_length=20), TextReading(max_length=30))
    with pytest.raises(CascadeError, match=r"max_length=20, .* with max_length=30; .* choose .* --max-text-length"):
        assemble(t5, stages, **TERMS)
    assert assemble(t5, stages, max_length=25, **TERMS).text_encoder.max_length == 25


def test_another_length_is_refused_where_padding_is_read(tmp_path: Path, t5: Path) -> None:
    stages = write_stages(tmp_path, PADDED, PADDED)
    with pytest.raises(CascadeError, match=r"max_length 64: these stages read all 150 tokens"):
        assemble(t5, stages, max_length=64, **TERMS)


def test_a_stage_that_does_not_say_is_read_as_its_neighbours_are_and_that_is_said(
    tmp_path: Path, t5: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cascade.load"):
        assert assemble(t5, write_stages(tmp_path, None, PADDED), **TERMS).text_encoder.reading == PADDED
    assert "base does not record how its text was read; assuming max_length=150, padded=true" in caplog.text
    assert assemble(t5, write_stages(tmp_path / "old", None), **TERMS).text_encoder.reading == TextReading()


def test_a_stage_without_text_has_no_say(tmp_path: Path, t5: Path) -> None:
    base, sr = tiny_configs()[:2]
    silent = sr.model_copy(update={"model": sr.model.model_copy(update={"text": "none"})})
    save_stage(tmp_path / "base", base, tiny_stage(base).network.state_dict(), reading=PADDED)
    save_stage(tmp_path / "sr16", silent, tiny_stage(silent).network.state_dict(), reading=TextReading())
    assert "text" not in json.loads((tmp_path / "sr16" / "stage.json").read_text())
    assert load_encoder(t5, [tmp_path / "base", tmp_path / "sr16"]).reading == PADDED


# --- and everywhere else ---------------------------------------------------------------------------------------------


def test_a_stage_behind_another_models_is_refused_where_it_reads_text_in_another_way(
    tmp_path: Path, t5: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, _ = write_stages(tmp_path, PADDED, PADDED)
    assemble(t5, [base], **TERMS).save_pretrained(tmp_path / "model")
    for place, reading in (("same", PADDED), ("other", TextReading(max_length=20, captions="deepfloyd"))):
        write_stages(tmp_path / place, reading, reading)
    mixed = CascadePipeline.from_pretrained(tmp_path / "model", super_resolution=tmp_path / "same" / "sr16")
    assert mixed.stage_names == ["base", "sr16"]
    with pytest.raises(
        CascadeError, match=r"the model is read with max_length=150, padded=true, .* with max_length=20, padded=false"
    ):
        CascadePipeline.from_pretrained(tmp_path / "model", super_resolution=tmp_path / "other" / "sr16")
    assemble(t5, write_stages(tmp_path / "short", TextReading(captions="deepfloyd")), **TERMS).save_pretrained(
        tmp_path / "plain"
    )
    with caplog.at_level(logging.WARNING, "cascade.load"):
        CascadePipeline.from_pretrained(tmp_path / "plain", super_resolution=tmp_path / "other" / "sr16")
    assert "sr16 was read with max_length=20; now it is read with max_length=64" in caplog.text


def test_a_run_that_takes_a_stage_by_name_reads_text_as_that_stage_did(tmp_path: Path, t5: Path) -> None:
    (base,) = write_stages(tmp_path, PADDED)
    path = tmp_path / "run.yaml"
    path.write_text(f"output: {tmp_path}/run\nstage: {base}\ndata: {{sources: [{{kind: scenes}}]}}\n")
    assert load_train_config(path).text.reading == PADDED
    assert load_train_config(path, ["text.captions=lower"]).text.captions == "lower"
    path.write_text(f"{path.read_text()}text: {{encoder: {t5}, max_length: 30}}\n")
    text = load_train_config(path).text
    assert (text.encoder, text.reading) == (str(t5), PADDED.model_copy(update={"max_length": 30}))


def test_a_run_goes_on_with_its_own_reading_when_the_stage_it_named_is_gone(tmp_path: Path, t5: Path) -> None:
    (base,) = write_stages(tmp_path, PADDED)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output: {tmp_path}/run\nstage: {base}\ntext: {{encoder: {t5}}}\ndata: {{sources: [{{kind: scenes}}]}}\n"
        "training: {steps: 1, batch_size: 2, optimizer: {warmup_steps: 0}}\n"
    )
    assert main(["train", str(path)]) == 0
    shutil.rmtree(base)
    assert load_train_config(path).text.reading == PADDED


def test_weights_that_go_on_with_text_read_in_another_way_are_worth_a_warning(
    tmp_path: Path, t5: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(tmp_path, t5, **PADDED.model_dump())
    settings = ["training.init_from=" + str(run), f"output={tmp_path}/next", "text.padded=false"]
    with caplog.at_level(logging.WARNING, "cascade.load"):
        load_trainer(load_train_config(tmp_path / "run.yaml", settings))
    assert "was read with padded=true; now it is read with padded=false" in caplog.text


def test_deepfloyd_ifs_own_folders_are_read_as_it_was_trained(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert read_reading(tmp_path) == IF_READING == TextReading(max_length=77, padded=True, captions="deepfloyd")
