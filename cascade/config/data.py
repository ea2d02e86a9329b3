"""What a stage is trained on: captions, their encoder, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cascade.bounds import PROCESSES, Pictures, Side, Tokens
from cascade.config.common import AugSpread, Fraction, PathText
from cascade.settings import Settings

Captions = Literal["as_is", "lower", "deepfloyd"]
"""How captions are cleaned; see `cascade.text.captions`."""


class TextReading(Settings):
    """How texts become tokens: a network expects prompts that are read as its captions were in training."""

    max_length: Tokens = 64
    """Tokens kept of a caption; longer ones are cut with a warning."""
    padded: bool = False
    """Give networks all `max_length` tokens, with what the encoder makes of the padding, as DeepFloyd IF reads them."""
    captions: Captions = "as_is"
    """Texts as they are, in lower case, or cleaned as DeepFloyd IF's captions were."""
    null_text: Literal["encoded", "zeros"] = "encoded"
    """What networks are given for no text: what the encoder makes of the empty prompt, or zeros, as Imagen has it."""


class TextConfig(TextReading):
    """The frozen text encoder of a training run."""

    encoder: PathText = "bundled"
    """`bundled`, a folder in transformers' layout, or a hub id such as google/flan-t5-base."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder."""
    cache: PathText | None = None
    """Folder of cached embeddings; captions not in it are encoded when met. None: encode every time."""

    @property
    def reading(self) -> TextReading:
        """Of these settings those that a stage's folder keeps."""
        return TextReading(**{name: getattr(self, name) for name in TextReading.model_fields})


class FolderSource(Settings):
    """A folder of pictures; captions in .txt or .caption files, or in metadata.jsonl / metadata.csv with file_name."""

    kind: Literal["folder"] = "folder"
    path: PathText
    """The folder; searched recursively, linked folders too, hidden ones not."""
    caption_column: str = "caption"
    """Column of metadata.jsonl or metadata.csv that holds the caption, or a list of variants."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class ParquetSource(Settings):
    """Parquet files with an encoded picture and a caption in each row."""

    kind: Literal["parquet"] = "parquet"
    files: tuple[PathText, ...]
    """Paths or glob patterns."""
    image_column: str = "image"
    """Column of encoded pictures (bytes, or a struct with `bytes`)."""
    caption_column: str = "caption"
    """Column of captions, or of lists of variants of which one is drawn per view."""
    low_column: str | None = None
    """Super-resolution: column of the smaller pictures, such as those that the stage before drew. None, or an empty
    cell: the area mean."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class HubSource(Settings):
    """Any dataset that Hugging Face `datasets` loads, streaming or not. The library keeps copies, of `kind: parquet`
    too, in ~/.cache/huggingface/datasets; HF_DATASETS_CACHE in the environment names another folder."""

    kind: Literal["datasets"] = "datasets"
    name: PathText
    """Hub id, builder name or local folder, as for `datasets.load_dataset`."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split."""
    streaming: bool = False
    """Read as a stream, without downloading first."""
    shuffle_buffer: Pictures = 1000
    """Streaming: records are shuffled within blocks of this many."""
    image_column: str = "image"
    """Column of pictures."""
    caption_column: str = "caption"
    """Column of captions or lists of variants."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


class WebDatasetSource(Settings):
    """WebDataset tar shards on a disk: neighbours 0001.jpg, 0001.txt are a record. Read in place, never unpacked."""

    kind: Literal["webdataset"] = "webdataset"
    files: tuple[PathText, ...]
    """Paths or glob patterns of uncompressed tar files. (Shards on a hub: `kind: datasets` with `streaming`.)"""
    caption: Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")] = "txt"
    """Ending of the members with captions: `txt`, of which each line is a variant, or `json`."""
    caption_column: str = "caption"
    """Key of the caption, or of a list of variants, in `json` members."""
    shuffle_block: Pictures = 10_000
    """Each epoch permutes the shards, then records within blocks of this many; nothing is held in memory."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the views, relative to the other sources."""


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
    """Whether a source has smaller pictures of its own."""
    return any(isinstance(source, ParquetSource) and source.low_column is not None for source in sources)


class DataConfig(Settings):
    """Where pictures and captions come from and how a view is made of them."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """One or several sources, mixed by weight."""
    caption_dropout: Fraction = 0.1
    """Probability that a caption gives way to the null text, for classifier-free guidance."""
    crop: Side | None = None
    """Super-resolution: train on random crops of this size (in pixels of the large picture). None: whole pictures."""
    tiles: bool = False
    """Super-resolution: the pictures are tiles cut from pictures of `resolution`; they are cropped, never resized."""
    aspect: Literal["crop", "pad"] = "pad"
    """Pictures that are not square are centre-cropped, or padded with white."""
    flip: Fraction = 0.0
    """Probability of mirroring, drawn scenes excepted; leave 0 where captions speak of left and right."""
    jitter: Fraction = 0.0
    """Largest random shift and zoom, as a share of the size, with white around; for pictures on white. Drawn scenes
    stay as they are."""
    max_aug_level: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Super-resolution: largest standard deviation of the noise on the smaller picture, which has any from 0 on."""
    aug_spread: AugSpread = "std"
    """Super-resolution: that noise is uniform in its standard deviation, or in the time of the cosine schedule, as
    Imagen and DeepFloyd IF draw it: a seventh of the pictures then have more than 0.97."""
    max_bad_share: Fraction = 0.05
    """Stop when a larger share of the records is broken or has no caption."""
    workers: Annotated[int, Field(ge=0), PROCESSES.validator] = 0
    """Processes that decode pictures beside the training process."""
    decoded: PathText | None = None
    """Folder for pictures decoded once, at the stage's `resolution`, and mapped into memory by every process from then
    on: 12 KB each at 64 px. The views are the same. Streams and drawn scenes are not stored. None: no such folder."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tiles and self.crop is None:
            raise ValueError("tiles: true needs crop, the size to cut from each tile")
        if self.tiles and self.jitter:
            raise ValueError("jitter resamples whole pictures; leave it 0 with tiles: true")
        if self.decoded is not None and (self.tiles or self.jitter or own_lows(self.sources)):
            raise ValueError("decoded stores pictures at one size; leave it out with tiles, jitter or a low_column")
        if self.jitter and own_lows(self.sources):
            raise ValueError("jitter would move a picture away from its low_column; leave it 0")
        return self
