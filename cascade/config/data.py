"""The training data of a stage (captions, their encoder, pictures), and types that all sections share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cascade.conditions.settings import ConditionName
from cascade.errors import CascadeError, quoted
from cascade.files.paths import expanded
from cascade.settings import COUNT, PROCESSES, Pictures, Settings, Side, Tokens

# --- common ----------------------------------------------------------------------------------------------------------
# Types that several sections of the settings share: bounded numbers, names, the version of the files.

FORMAT_VERSION = 1
"""Version of every file written from these settings; `cascade.storage` reads this version."""

AugSpread = Literal["std", "time"]
"""The quantity in which the noise on a smaller picture is uniform in training; see `training.step.aug_levels`."""
Fraction = Annotated[float, Field(ge=0, le=1)]


def _path(text: str) -> str:
    if not text:
        raise ValueError("is empty; name a file or folder")
    return expanded(text)


PathText = Annotated[str, AfterValidator(_path)]
"""A path, or the name of something on the hub: not empty; a leading `~` is the home folder."""


# --- data ------------------------------------------------------------------------------------------------------------
# The training data of a stage: captions, their encoder, and pictures.

Captions = Literal["as_is", "lower", "deepfloyd"]
"""Ways to clean captions; see `cascade.text.language`."""


class TextReading(Settings):
    """Conversion of texts to tokens; a network expects prompts that are read as its training captions were."""

    max_length: Tokens = 64
    """Tokens kept of a caption; longer ones are cut with a warning."""
    padded: bool = False
    """Pass all `max_length` tokens to networks, including the encoder's output for padding, as DeepFloyd IF does."""
    captions: Captions = "as_is"
    """Captions as they are, in lower case, or cleaned as those of DeepFloyd IF."""
    null_text: Literal["encoded", "zeros"] = "encoded"
    """Input of networks for no text: the encoder's output for the empty prompt, or zeros, as in Imagen."""


class TextConfig(TextReading):
    """The frozen text encoder of a training run."""

    encoder: PathText = "bundled"
    """`bundled`, a folder in transformers' layout, or a hub id such as google/flan-t5-base."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder."""
    cache: PathText | None = None
    """Folder of cached embeddings; other captions are encoded during training. None: no cache."""

    @property
    def reading(self) -> TextReading:
        """The part of these settings that a stage's folder records."""
        return TextReading(**{name: getattr(self, name) for name in TextReading.model_fields})


Split = Literal["all", "train", "held_out"]
"""All pictures, all but one in sixteen, or that one: by the picture's name, so that new pictures move no other."""


class WordingConfig(Settings):
    """Changes to a source's captions, made for each view; without them a caption is read as it is."""

    templates: tuple[Annotated[str, Field(pattern=r"\{\}")], ...] = ()
    """Sentences such as `a photo of {}`, one of which is chosen; `{}` is the caption. Empty: the caption alone."""
    trigger: str | None = None
    """A word or phrase placed before every caption, with a comma between them. None: nothing."""
    shuffle_tags: bool = False
    """Captions are tags between commas, whose order changes with each view."""
    keep_tags: Annotated[int, Field(ge=0), COUNT.validator] = 1
    """Number of first tags that neither move nor are left out."""
    tag_dropout: Fraction = 0.0
    """Probability of leaving out each tag."""


Repeats = Annotated[float, Field(gt=0)] | None
Columns = dict[ConditionName, str]


class FolderSource(Settings):
    """A folder of pictures; captions in .txt or .caption files, or in metadata.jsonl / metadata.csv with file_name."""

    kind: Literal["folder"] = "folder"
    path: PathText
    """The folder; searched recursively, including linked folders, without hidden ones."""
    caption_column: str = "caption"
    """Column of metadata.jsonl or metadata.csv that holds the caption, or a list of variants. A file without `caption`
    may call it `text`, as diffusers' examples do."""
    names: Literal["none", "file", "folder"] = "none"
    """Caption of a picture without any: the name of its file, or of the folder that it is in; `red-apple_03.png` is
    `red apple`."""
    columns: Columns = Field(default_factory=dict)
    """Columns of the stage's conditions whose column has another name; see conditions.md."""
    masks: bool = False
    """`cat-masklabel.png` next to `cat.png` is a mask for its loss, as in OneTrainer: white parts count, black ones
    with `training.loss.unmasked_weight` alone. A picture without a mask counts entirely."""
    folder_condition: ConditionName | None = None
    """Condition of kind `class` whose label is the name of the folder that a picture is in. None: no such condition."""
    split: Split = "all"
    """`train`: all pictures but one in sixteen, chosen by their names; `held_out`: those, for validation."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""
    repeats: Repeats = None
    """In place of `weight`: how often each of its pictures is shown, relative to those of the other sources."""
    wording: WordingConfig = WordingConfig()
    """Changes to its captions."""


class ParquetSource(Settings):
    """Parquet files with an encoded picture and a caption in each row."""

    kind: Literal["parquet"] = "parquet"
    files: tuple[PathText, ...]
    """Paths or glob patterns."""
    image_column: str = "image"
    """Column of encoded pictures (bytes, or a struct with `bytes`)."""
    caption_column: str = "caption"
    """Column of captions, or of lists of variants, one of which is chosen per view."""
    low_column: str | None = None
    """Super-resolution: column of the smaller pictures, such as an earlier stage's output. None, or an empty cell: the
    area mean."""
    mask_column: str | None = None
    """Column of masks for the loss, of each picture's size; see `masks` of a folder. None, or an empty cell: none."""
    columns: Columns = Field(default_factory=dict)
    """Columns of the stage's conditions whose column has another name; see conditions.md."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""
    repeats: Repeats = None
    """In place of `weight`: how often each of its pictures is shown, relative to those of the other sources."""
    wording: WordingConfig = WordingConfig()
    """Changes to its captions."""


class HubSource(Settings):
    """Any dataset that Hugging Face `datasets` loads, streaming or not. The library keeps copies (also for `kind:
    parquet`) in ~/.cache/huggingface/datasets; the environment variable HF_DATASETS_CACHE names another folder."""

    kind: Literal["datasets"] = "datasets"
    name: PathText
    """Hub id, builder name or local folder, as for `datasets.load_dataset`."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split."""
    streaming: bool = False
    """Read as a stream, without downloading the data first."""
    shuffle_buffer: Pictures = 1000
    """Streaming: records are shuffled within blocks of this many."""
    image_column: str = "image"
    """Column of pictures."""
    caption_column: str = "caption"
    """Column of captions or lists of variants."""
    columns: Columns = Field(default_factory=dict)
    """Columns of the stage's conditions whose column has another name; see conditions.md."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""
    repeats: Repeats = None
    """In place of `weight`: how often each of its pictures is shown, relative to those of the other sources."""
    wording: WordingConfig = WordingConfig()
    """Changes to its captions."""


class WebDatasetSource(Settings):
    """WebDataset tar shards on a disk: neighbours 0001.jpg, 0001.txt form a record. Read in place, never unpacked."""

    kind: Literal["webdataset"] = "webdataset"
    files: tuple[PathText, ...]
    """Paths or glob patterns of uncompressed tar files. (Shards on a hub: `kind: datasets` with `streaming`.)"""
    caption: Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")] = "txt"
    """Ending of the caption members: `txt`, each line a variant, or `json`."""
    caption_column: str = "caption"
    """Key of the caption, or of a list of variants, in `json` members."""
    columns: Columns = Field(default_factory=dict)
    """`caption: json`: keys of the stage's conditions whose key has another name; see conditions.md."""
    shuffle_block: Pictures = 10_000
    """Each epoch permutes the shards, then records within blocks of this size; no records are held in memory."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""
    repeats: Repeats = None
    """In place of `weight`: how often each of its pictures is shown, relative to those of the other sources."""
    wording: WordingConfig = WordingConfig()
    """Changes to its captions."""


class ScenesSource(Settings):
    """Drawn scenes of coloured shapes: endless, labelled, no files."""

    kind: Literal["scenes"] = "scenes"
    held_out: bool = False
    """Draw only the attribute pairs that are otherwise never drawn; for evaluation."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


SourceConfig = Annotated[
    FolderSource | ParquetSource | WebDatasetSource | HubSource | ScenesSource, Field(discriminator="kind")
]


def own_lows(sources: Sequence[SourceConfig]) -> bool:
    """Whether a source has a column of smaller pictures."""
    return any(isinstance(source, ParquetSource) and source.low_column is not None for source in sources)


def has_masks(sources: Sequence[SourceConfig]) -> bool:
    """Whether a source has masks for the loss."""
    return any(getattr(source, "masks", False) or getattr(source, "mask_column", None) for source in sources)


class DataConfig(Settings):
    """The sources of pictures and captions, and how a view is made from them."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """One or several sources, mixed by weight."""
    caption_dropout: Fraction = 0.1
    """Probability that a caption is replaced by the null text, for classifier-free guidance."""
    joint_dropout: Fraction = 0.1
    """Stages with conditions: probability that all of them, and the caption, are replaced by their nulls together, as
    guidance needs; each has a `dropout` of its own, too."""
    uncaptioned: Literal["skip", "drop"] = "skip"
    """Records without a caption, for a stage that reads text: they are skipped as bad ones, or count as dropped."""
    crop: Side | None = None
    """Super-resolution: train on random crops of this size (in pixels of the large picture). None: whole pictures."""
    tiles: bool = False
    """Super-resolution: the pictures are tiles cut from pictures of `resolution`; they are cropped, never resized."""
    aspect: Literal["crop", "pad"] = "pad"
    """Pictures that are not square are centre-cropped, or padded with white."""
    buckets: Annotated[tuple[Annotated[float, Field(ge=0.05, le=20)], ...], Field(min_length=1)] | None = None
    """Aspect ratios, width / height, such as [1, 0.67, 1.5]: each batch holds pictures of one ratio, of about the area
    of `resolution`, and a picture belongs to the nearest one; `aspect` then concerns the little that is left. Not for
    streams. None: squares."""
    flip: Fraction = 0.0
    """Probability of mirroring; never for drawn scenes, nor for a picture with a caption that mentions left, right, a
    flag or letters."""
    jitter: Fraction = 0.0
    """Largest random shift and zoom, as a share of the size, filled with white; for pictures on white. Drawn scenes are
    not changed."""
    max_aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Super-resolution: the noise on the smaller picture has a standard deviation from 0 to this."""
    aug_spread: AugSpread = "std"
    """Super-resolution: that noise is uniform in its standard deviation, or in the time of the cosine schedule, as in
    Imagen and DeepFloyd IF: a seventh of the pictures then have more than 0.97."""
    max_bad_share: Fraction = 0.05
    """Stop when a larger share of the records is broken or has no caption."""
    workers: Annotated[int, Field(ge=0), PROCESSES.validator] = 0
    """Processes that decode pictures in addition to the training process."""
    decoded: PathText | None = None
    """Folder for pictures that are decoded once, at the stage's `resolution`, and then memory-mapped by every process:
    12 KB each at 64 px. The views are the same. Streams and drawn scenes are not stored. None: no such folder."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        repeated = [getattr(source, "repeats", None) is not None for source in self.sources]
        if any(repeated) and not all(repeated):
            raise ValueError("repeats needs to be set for every source or for none; others have a weight")
        if self.tiles and self.crop is None:
            raise ValueError("tiles: true needs crop, the size to cut from each tile")
        if self.tiles and self.jitter:
            raise ValueError("jitter resamples whole pictures; leave it 0 with tiles: true")
        if self.decoded is not None and (self.tiles or self.jitter or own_lows(self.sources)):
            raise ValueError("decoded stores pictures at one size; leave it out with tiles, jitter or a low_column")
        if self.buckets is not None and (self.crop is not None or self.decoded is not None or own_lows(self.sources)):
            raise ValueError("buckets are for whole pictures; leave out crop, tiles, decoded and a low_column")
        if self.jitter and own_lows(self.sources):
            raise ValueError("jitter would move a picture away from its low_column; leave it 0")
        return self


# --- format ----------------------------------------------------------------------------------------------------------


def check_format(path: str | Path, version: object) -> None:
    """Raises CascadeError unless a file's `format` is the one that this version of cascade reads."""
    if version != FORMAT_VERSION:
        raise CascadeError(
            f"{path}: format {quoted(version)}; this version of cascade reads format {FORMAT_VERSION}; use the version"
            " that wrote the file, or write it again with this one"
        )
