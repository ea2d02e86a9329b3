"""How an output folder is laid out: the format of its files, and what each shard calls its own."""

from __future__ import annotations

from dataclasses import dataclass

WEBDATASET = "webdataset"


@dataclass(frozen=True)
class Layout:
    """How the output is stored.

    format: png, webp, jpeg, or webdataset: PNG in tar shards of `tar_size` prompts. shard: (which, of how many).
    """

    format: str = "png"
    tar_size: int = 1000
    shard: tuple[int, int] = (0, 1)

    @property
    def in_tars(self) -> bool:
        """Whether pictures become members of tars."""
        return self.format == WEBDATASET

    @property
    def picture_format(self) -> str:
        """Of the single pictures."""
        return "png" if self.in_tars else self.format

    def named(self, stem: str, ending: str = "") -> str:
        """A file of which each shard has its own: `manifest.jsonl`, or `manifest-00003-of-00016.jsonl`."""
        which, count = self.shard
        middle = f"-{which:05d}-of-{count:05d}" if count > 1 else ""
        return f"{stem}{middle}{ending}"
