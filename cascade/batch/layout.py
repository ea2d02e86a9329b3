"""The layout of an output folder: picture format, and names of the files that each shard has."""

from __future__ import annotations

from dataclasses import dataclass

from cascade.rasters import Background

WEBDATASET = "webdataset"


@dataclass(frozen=True)
class Layout:
    """The storage format of the output.

    format: png, webp, jpeg, tiff, npy, or webdataset: tar shards of `tar_size` prompts. shard: (number, count).
    background: behind transparent parts; `none` keeps them transparent. member: format of the pictures in tars.
    """

    format: str = "png"
    tar_size: int = 1000
    shard: tuple[int, int] = (0, 1)
    background: Background = "none"
    member: str = "png"

    @property
    def in_tars(self) -> bool:
        """Whether pictures are stored in tars."""
        return self.format == WEBDATASET

    @property
    def described(self) -> dict[str, str]:
        """The entries of a picture's metadata on its file; none where it is as usual."""
        return {} if self.background == "none" else {"background": self.background}

    @property
    def picture_format(self) -> str:
        """Format of each picture file."""
        return self.member if self.in_tars else self.format

    def named(self, stem: str, ending: str = "") -> str:
        """The name of a file that each shard has: `manifest.jsonl`, or `manifest-00003-of-00016.jsonl`."""
        which, count = self.shard
        middle = f"-{which:05d}-of-{count:05d}" if count > 1 else ""
        return f"{stem}{middle}{ending}"
