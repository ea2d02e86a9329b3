"""Settings: mistakes give a one-line error; correct settings survive a round trip through YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade.config.sampling import SamplingConfig
from cascade.config.stage import CosineSchedule, StageConfig, read_stage_config
from cascade.config.training import TrainConfig
from cascade.diffusion.noise import LOG_SNR_RANGE
from cascade.errors import CascadeError
from cascade.settings import override, parse, read_yaml, to_yaml
from cascade.storage.index import BUNDLED
from cascade.storage.training import load_train_config

SMALLEST: dict[str, Any] = {
    "output": "runs/x",
    "stage": {"name": "base", "resolution": 64},
    "data": {"sources": [{"kind": "scenes"}]},
}

MISTAKES = [
    ("stage.model.chanels=[8]", "stage.model.chanels is not a setting; did you mean stage.model.channels?"),
    ("trainng.steps=1", "trainng is not a setting; did you mean training?"),
    ("xyz=1", "xyz is not a setting; the file has format, output, stage, text, data, training"),
    ("training.ema.xyz=1", "training.ema.xyz is not a setting; training.ema has half_life_images, warmup"),
    ("data.sources.0.hold_out=1", "data.sources.0.hold_out is not a setting; did you mean data.sources.0.held_out?"),
    ("stage.presets.fast.stps=1", "stage.presets.fast.stps is not a setting; did you mean stage.presets.fast.steps?"),
    ("stage.presets.slow.steps=1", "stage.presets.slow: 'slow' is not one of fast, best"),
    ("training.steps=ten", 'training.steps: should be a valid integer, not "ten"'),
    ("training.steps='10'", 'training.steps: should be a valid integer, not "10"'),
    ("training.steps=0", "training.steps: should be greater than 0, not 0"),
    ("training.compile=1", "training.compile: should be a valid boolean, not 1"),
    (
        "training.optimizer.learning_rate=.inf",
        "training.optimizer.learning_rate: should be a finite number, not Infinity",
    ),
    ("stage.model=3", "stage.model: should be a section, not 3"),
    ("stage.model.channels=8", "stage.model.channels: should be a list, not 8"),
    ("stage.model.strides=[1, 3, 2]", "stage.model.strides.1: should be 1 or 2, not 3"),
    ("stage.name=Base", "stage.name: should be text of the pattern '^[a-z][a-z0-9_]*$', not \"Base\""),
    ("stage.sampling.threshold=1.5", "stage.sampling.threshold: should be less than 1 or 'clip', not 1.5"),
    ("stage.sampling.threshold=clp", "stage.sampling.threshold: should be a valid number or 'clip', not \"clp\""),
    (
        "stage.sampling.sampler=ddmp",
        "stage.sampling.sampler: 'ddmp' is not one of ddpm, ddim, heun, dpm++; did you mean ddpm?",
    ),
    (
        "stage.schedule.kind=cosne",
        "stage.schedule.kind: 'cosne' is not one of constant, linear, squared_cosine, cosine; did you mean cosine?",
    ),
    ("stage.schedule={steps: 10}", "stage.schedule.kind is missing"),
    ("stage.schedule={kind: linear, beta_end: 2}", "stage.schedule.beta_end: should be less than 1, not 2"),
    (
        "stage.schedule={kind: cosine, log_snr_min: 5, log_snr_max: 3}",
        "stage.schedule: log_snr_min 5.0 must be less than log_snr_max 3.0",
    ),
    (
        "stage.schedule={kind: cosine, log_snr_min: -30}",
        "stage.schedule.log_snr_min: should be greater than or equal to -20, not -30",
    ),
    (
        "stage.schedule={kind: cosine, log_snr_max: 21}",
        "stage.schedule.log_snr_max: should be less than or equal to 20, not 21",
    ),
    (
        f"training.seed={2**63}",
        f"training.seed: should be less than or equal to {2**63 - 1}, not {2**63}",
    ),
    ("training.optimizer.betas=[0.9, 1.0]", "training.optimizer.betas.1: should be less than 1, not 1.0"),
    (
        "stage.sampling.steps=1000001",
        "stage.sampling.steps: 1,000,001 is more than 100,000, each of which calls the network; up to 1,000 are usual",
    ),
    (
        "stage.presets.fast.steps=1000001",
        "stage.presets.fast.steps: 1,000,001 is more than 100,000, each of which calls the network; up to 1,000 are"
        " usual",
    ),
    (
        "stage.sampling.guidance_interval=[3, -2.5]",
        "stage.sampling: guidance_interval [3, -2.5] is empty; give the smaller log SNR first",
    ),
    (
        "stage.name=text_encoder",
        "stage: name text_encoder is taken by another part of a cascade's folder; choose another",
    ),
    ("stage.name=cascade", "stage: name cascade is taken by another part of a cascade's folder; choose another"),
    ("data.sources=[]", "data.sources is empty; give at least one"),
    ("data.sources=[{kind: folder}]", "data.sources.0.path is missing"),
    (
        "data.sources.0.kind=foldr",
        "data.sources.0.kind: 'foldr' is not one of folder, parquet, webdataset, datasets, scenes;"
        " did you mean folder?",
    ),
    ("stage.model.blocks=[1]", "stage.model: blocks has 1 entries, channels has 3; give one per level"),
    ("stage.model.head_dim=60", "stage.model: head_dim 60 does not divide the 128 channels that attend"),
    (
        "stage.model.groups=5",
        "stage.model: groups 5 does not divide 64 channels; use norm: pixel or fewer groups",
    ),
    ("stage.model.embedding_dim=33", "stage.model: embedding_dim 33 must be even: half sines, half cosines"),
    ("stage.low_resolution=48", "stage: resolution 64 is not a multiple of low_resolution 48"),
    ("stage.low_resolution=64", "stage: low_resolution 64 must be smaller than resolution 64"),
    ("stage.model.channels=[]", "stage.model: channels is empty; give at least one level"),
    ("stage.path=residual", "stage: path: residual needs low_resolution, the smaller picture it differs from"),
    ("stage.resolution=66", "stage: resolution 66 is not a multiple of 4, the factor by which the model reduces it"),
    ("data.crop=32", "data.crop is for super-resolution stages; this stage has no low_resolution"),
    ("training.accumulation=3", "training: batch_size 16 is not a multiple of accumulation 3"),
    (
        "training.optimizer.decay_steps=950",
        "training: optimizer.warmup_steps + decay_steps = 1050 is longer than the run of 1000 steps",
    ),
    ("format=2", "format: should be 1, not 2"),
]


@pytest.mark.parametrize(("assignment", "message"), MISTAKES, ids=[assignment for assignment, _ in MISTAKES])
def test_a_mistake_is_explained_in_one_line(assignment: str, message: str) -> None:
    with pytest.raises(CascadeError) as raised:
        parse(TrainConfig, override(SMALLEST, [assignment]), "base.yaml")
    assert str(raised.value) == f"base.yaml: {message}"


def test_every_mistake_gets_its_line() -> None:
    with pytest.raises(CascadeError) as raised:
        parse(TrainConfig, override(SMALLEST, ["training.steps=0", "stage.modle=1"]), "base.yaml")
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize("missing", ["output", "stage", "data"])
def test_a_missing_section_is_named(missing: str) -> None:
    rest = {name: value for name, value in SMALLEST.items() if name != missing}
    with pytest.raises(CascadeError, match=f"^x.yaml: {missing} is missing$"):
        parse(TrainConfig, rest, "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected settings as `name: value`, found list"),
        ("", "expected settings as `name: value`, found nothing"),
        ("a: [1,\n", "not valid YAML: while parsing"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(CascadeError) as raised:
        read_yaml(path)
    assert str(raised.value).startswith(f"{path}: {message}")
    assert "\n" not in str(raised.value)


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("training:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    with pytest.raises(CascadeError) as raised:
        read_yaml(path)
    assert str(raised.value) == f"{path}: not valid YAML: line 4: steps is set a second time; keep one"
    with pytest.raises(CascadeError, match="is not a YAML value"):
        override(SMALLEST, ["training={steps: 1, steps: 2}"])


def test_the_same_key_elsewhere_and_a_merged_one_are_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nb: {<<: *a, b: 3}\n")
    assert read_yaml(path) == {"a": {"b": 1, "c": 2}, "b": {"b": 3, "c": 2}}


def test_a_number_of_thousands_of_digits_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: " + "9" * 5000)
    with pytest.raises(CascadeError, match=r"x\.yaml: not valid YAML"):
        read_yaml(path)
    with pytest.raises(CascadeError, match="is not a YAML value"):
        override(SMALLEST, ["training.steps=" + "9" * 5000])
    with pytest.raises(CascadeError, match=r"^stage base: a number has thousands of digits$"):
        parse(SamplingConfig, {"steps": 10**5000}, "stage base")


def test_log_snr_may_be_set_as_far_as_the_mathematics_clips_it() -> None:
    low, high = LOG_SNR_RANGE
    parse(CosineSchedule, {"log_snr_min": low, "log_snr_max": high}, "here")
    for beyond in ({"log_snr_min": low - 0.1}, {"log_snr_max": high + 0.1}):
        with pytest.raises(CascadeError, match=f"here: {next(iter(beyond))}: should be "):
            parse(CosineSchedule, beyond, "here")


def test_a_missing_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match=r"none\.yaml: no such file$"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(CascadeError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(CascadeError, match=r"latin\.yaml: not UTF-8; save the file as UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


def test_numbers_and_words_of_yaml_mean_what_everybody_expects(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-4\nb: 1E5\nc: -2.5e+3\nd: 2024-01-01\ne: 1\nf: e4\n")
    assert read_yaml(path) == {"a": 1e-4, "b": 1e5, "c": -2500.0, "d": "2024-01-01", "e": 1, "f": "e4"}


@pytest.mark.parametrize("schedule", ["constant", "linear", "squared_cosine", "cosine"])
def test_settings_survive_the_way_through_yaml(tmp_path: Path, schedule: str) -> None:
    assignments = [
        f"stage.schedule={{kind: {schedule}}}",
        "stage.sampling.guidance_interval=[-2.5, 3]",
        "stage.presets.fast.steps=4",
        "training.optimizer.learning_rate=3e-4",
        "training.loss.levels={kind: logit_normal, std: 1.5}",
        "data.sources=[{kind: folder, path: a}, {kind: parquet, files: [b]}, {kind: datasets, name: c}]",
    ]
    config = parse(TrainConfig, override(SMALLEST, assignments), "x")
    path = tmp_path / "x.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_train_config(path) == config


def test_assignments_change_a_copy_in_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(to_yaml(parse(TrainConfig, SMALLEST, "x")))
    config = load_train_config(path, ["training.steps=5000", "data.sources.0.weight=2", "training.loss.space=v"])
    assert (config.training.steps, config.data.sources[0].weight, config.training.loss.space) == (5000, 2.0, "v")
    override(SMALLEST, ["stage.name=other", "data.sources.0.weight=3"])
    assert SMALLEST["stage"]["name"] == "base"
    assert SMALLEST["data"]["sources"] == [{"kind": "scenes"}]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.steps", "'training.steps': expected key=value, such as training.steps=100"),
        ("=3", "'=3': expected key=value, such as training.steps=100"),
        ("training.steps=[", "'training.steps=[': '[' is not a YAML value"),
        (
            "data.sources.1.weight=2",
            "'data.sources.1.weight=2': data.sources is a list of 1; '1' is not a position in it",
        ),
        ("data.sources.²=2", "'data.sources.²=2': data.sources is a list of 1; '²' is not a position in it"),
        ("data.sources.x=2", "'data.sources.x=2': data.sources is a list of 1; 'x' is not a position in it"),
        ("output.x=2", "'output.x=2': output is a value, not a section"),
    ],
)
def test_a_wrong_assignment_is_named(assignment: str, message: str) -> None:
    with pytest.raises(CascadeError) as raised:
        override(SMALLEST, [assignment])
    assert str(raised.value) == message


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        StageConfig(name="base", resolution=64).name = "other"  # type: ignore[misc]


def test_the_divisor_counts_the_stem_and_all_strides() -> None:
    stage = StageConfig.model_validate({"name": "s", "resolution": 64, "model": {"patch": 2, "strides": (2, 2, 1)}})
    assert stage.geometry.divisor == 8


def test_a_crop_must_suit_both_the_scale_and_the_depth() -> None:
    """Scale 3 and depth 4: 16 is a multiple of the larger of the two and of no use."""
    changes = ["stage.resolution=48", "stage.low_resolution=16", "data.crop=16"]
    with pytest.raises(CascadeError, match=r"data\.crop 16 must be a multiple of 12"):
        parse(TrainConfig, override(SMALLEST, changes), "test.yaml")


def test_a_section_that_contains_itself_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test.yaml"
    path.write_text("output: &a [*a]\n")
    with pytest.raises(CascadeError, match=r"test\.yaml: not valid YAML: line 1: holds itself"):
        load_train_config(path)


def test_a_stage_by_name_brings_all_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output: out\nstage: bundled/base\ndata: {sources: [{kind: scenes}]}\n")
    config = load_train_config(path, ["stage.sampling.steps=3"])
    stored = read_stage_config(BUNDLED / "base")
    assert config.stage == stored.model_copy(update={"sampling": stored.sampling.model_copy(update={"steps": 3})})
    path.write_text("output: out\nstage: nothing/here\ndata: {sources: [{kind: scenes}]}\n")
    with pytest.raises(CascadeError, match=r"run\.yaml: stage: nothing/here: no stage here"):
        load_train_config(path)


def test_a_stage_may_be_named_in_an_assignment_before_what_changes_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("output: out\nstage: {}\ndata: {sources: [{kind: scenes}]}\n")
    named = load_train_config(path, ["stage.sampling.steps=3", "stage=bundled/base"])
    path.write_text("output: out\nstage: bundled/base\ndata: {sources: [{kind: scenes}]}\n")
    assert named == load_train_config(path, ["stage.sampling.steps=3"])
    assert named.stage.sampling.steps == 3
