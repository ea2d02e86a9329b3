"""The layout of an output folder: picture format, and names of the files that each shard has."""

from __future__ import annotations

from dataclasses import dataclass, field

from cascade.finish import Finish

WEBDATASET = "webdataset"


@dataclass(frozen=True)
class Layout:
    """The storage format of the output.

    format: png, webp, jpeg, tiff, npy, or webdataset: tar shards of `tar_size` prompts. shard: (number, count).
    finish: what is done to pictures before they are written. member: format of the pictures in tars.
    """

    format: str = "png"
    tar_size: int = 1000
    shard: tuple[int, int] = (0, 1)
    finish: Finish = field(default_factory=Finish)
    member: str = "png"

    @property
    def in_tars(self) -> bool:
        """Whether pictures are stored in tars."""
        return self.format == WEBDATASET

    @property
    def picture_format(self) -> str:
        """Format of each picture file."""
        return self.member if self.in_tars else self.format

    def named(self, stem: str, ending: str = "") -> str:
        """The name of a file that each shard has: `manifest.jsonl`, or `manifest-00003-of-00016.jsonl`."""
        which, count = self.shard
        middle = f"-{which:05d}-of-{count:05d}" if count > 1 else ""
        return f"{stem}{middle}{ending}"
