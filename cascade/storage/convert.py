"""`cascade convert`: DeepFloyd IF from diffusers' folder layout to ours and back. Weights are copied bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from cascade.config.data import FORMAT_VERSION, TextReading
from cascade.config.stage import StageConfig, save_stage
from cascade.errors import CascadeError
from cascade.files.atomic import atomic_folder, read_json, write_json
from cascade.files.paths import expanded, one_variant, path_of, variant_of
from cascade.storage import diffusers
from cascade.storage.index import ModelIndex, download, find_stage, may_be_on_hub, read_index
from cascade.storage.stage import read_config, read_reading, read_weights

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "spiece.model",
    "added_tokens.json",
)


def convert(source: str | Path, out: str | Path, super_resolution: Sequence[str | Path] = ()) -> list[str]:
    """Write the model `source` into the folder `out` in the other layout; returns the names of the stages written.

    From diffusers: one cascade folder, with the stages of `super_resolution` after the first; a second stage alone
    becomes a stage folder. To diffusers: a cascade of one stage fills `out` itself, one of several stages a folder each
    in it. Raises CascadeError if `out` exists, or if a network is not DeepFloyd IF's.
    """
    out, source = path_of(out), expanded(str(source))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CascadeError(f"{out}: exists already; name a new or empty folder")
    if (Path(source) / "stage.json").is_file():
        config, reading = read_config(source), read_reading(source)
        _check_reading(reading or diffusers.READING, source)
        with atomic_folder(out) as temporary:
            diffusers.write_stage(temporary, config, read_weights(source)[0])
        return [config.name]
    folder = download(source, text=False) if may_be_on_hub(source) else Path(source)  # a second stage needs no T5
    if _is_second_stage(folder):
        config = diffusers.read_stage(folder)
        save_stage(out, config, diffusers.read_weights(folder), reading=diffusers.READING)
        return [config.name]
    index = read_index(source)
    stages = [*index.stages, *(find_stage(stage) for stage in super_resolution)]
    if diffusers.is_diffusers(index.stages[0]):
        return _to_ours(index, stages, out)
    return _to_diffusers(index, stages, out)


def _is_second_stage(folder: Path) -> bool:
    return diffusers.is_diffusers(folder) and diffusers.read_stage(folder).low_resolution is not None


def _to_ours(index: ModelIndex, stages: Sequence[Path], out: Path) -> list[str]:
    configs = [read_config(stage) for stage in stages]
    _check_names(configs)
    with atomic_folder(out) as temporary:
        (temporary / "text_encoder").mkdir()
        for part in ("text_encoder", "tokenizer"):
            _copy(_needed(index.text_encoder.parent / part), temporary / "text_encoder")
        for config, stage in zip(configs, stages, strict=True):
            save_stage(temporary / config.name, config, read_weights(stage)[0], reading=index.reading)
        write_json(
            temporary / "cascade.json",
            {
                "format": FORMAT_VERSION,
                "name": index.name,
                "license": index.license,
                "stages": [config.name for config in configs],
                "max_text_length": index.max_text_length,
                "text_padded": index.text_padded,
                "captions": index.captions,
            },
        )
    return [config.name for config in configs]


def _to_diffusers(index: ModelIndex, stages: Sequence[Path], out: Path) -> list[str]:
    configs = [read_config(stage) for stage in stages]
    _check_reading(index.reading, index.name)
    with atomic_folder(out) as temporary:
        for config, stage in zip(configs, stages, strict=True):
            folder = temporary if len(configs) == 1 else temporary / config.name
            diffusers.write_stage(folder, config, read_weights(stage)[0], _tokenizer_class(index.text_encoder))
            files = _needed(index.text_encoder)
            words = [file for file in files if file.name in TOKENIZER_FILES]
            _copy(words, folder / "tokenizer")
            _copy([file for file in files if file not in words], folder / "text_encoder")
            (folder / "README.md").write_text(f"---\nlicense: {index.license}\n---\n", encoding="utf-8")
    return [config.name for config in configs]


def _check_reading(reading: TextReading, name: str | Path) -> None:
    """Raises CascadeError if diffusers' pipelines would read the text differently."""
    theirs = diffusers.READING
    if (reading.max_length, reading.padded) != (theirs.max_length, theirs.padded):
        raise CascadeError(
            f"{name}: reads {reading.max_length} tokens {'with' if reading.padded else 'without'} padding; IF's"
            f" pipelines in diffusers read {theirs.max_length} with padding and would draw other pictures"
        )
    if reading.null_text != theirs.null_text:
        raise CascadeError(f"{name}: its null text is zeros; IF's pipelines in diffusers encode the empty prompt")


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    return str(read_json(path).get("tokenizer_class", "T5Tokenizer")) if path.exists() else "T5Tokenizer"


def _needed(folder: Path) -> list[Path]:
    """The files that loading needs: no pickles, and half precision only if there are no other weights."""
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".json", ".safetensors", ".model")]
    weights = one_variant(file for file in files if file.suffix == ".safetensors")
    variant = variant_of(weights[0]) if weights else None
    others = [file for file in files if file.suffix != ".safetensors" and variant_of(file) in (None, variant)]
    return [*others, *weights]


def _copy(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _check_names(configs: Sequence[StageConfig]) -> None:
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise CascadeError(f"stages {', '.join(names)}: every stage needs a different name")
