"""Embeddings on disk: equal to the encoder's, found by prompt, safe against crashes and mix-ups."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import cascade
from cascade.conditioning import TextEmbeddings
from cascade.errors import CascadeError
from cascade.files.tensors import save_tensors
from cascade.text.cache import EmbeddingCache, Lookup, Place
from cascade.text.cached import CachedTextEncoder, Pace, fill

CAPTIONS = [f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "fox of the sea", "🦊")]


class CountingEncoder:
    """Embeddings that follow from the prompt's bytes alone, and a list of what was encoded."""

    dim = 4

    def __init__(self, fingerprint: str = "counting") -> None:
        self.fingerprint = fingerprint
        self.encoded: list[str] = []
        self.released = False
        self.device: torch.device | str | None = None

    def encode(self, prompts: Sequence[str], batch_size: int = 1) -> TextEmbeddings:
        assert batch_size >= 1
        self.encoded += prompts
        return TextEmbeddings.from_rows([self.row(prompt) for prompt in prompts])

    def row(self, prompt: str) -> torch.Tensor:
        values = torch.tensor([*prompt.encode(), 0], dtype=torch.float32)
        return torch.sin(values[:, None] * torch.arange(1, self.dim + 1))

    def to(self, device: torch.device | str | None = None) -> CountingEncoder:
        self.device = device
        return self

    def release(self) -> None:
        self.released = True


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache", "counting", 4)


def _filled(tmp_path: Path, shard_size: int = 4) -> Path:
    encoder = CountingEncoder()
    fill(EmbeddingCache(tmp_path / "cache", "counting", 4), encoder, CAPTIONS, Pace(shard_size=shard_size))
    return tmp_path / "cache"


def test_values_are_the_encoders_rounded_to_bf16(encoder: CountingEncoder, tmp_path: Path) -> None:
    reopened = EmbeddingCache(_filled(tmp_path), "counting", 4)
    read = reopened.get(CAPTIONS)
    expected = encoder.encode(CAPTIONS).to(dtype=torch.bfloat16)
    assert torch.equal(read.tokens, expected.tokens)
    assert torch.equal(read.mask, expected.mask)


def test_each_caption_and_the_null_text_are_encoded_once(encoder: CountingEncoder, cache: EmbeddingCache) -> None:
    assert fill(cache, encoder, CAPTIONS * 3, Pace(shard_size=4)) == len(CAPTIONS) + 1
    assert sorted(encoder.encoded) == sorted(["", *CAPTIONS])
    assert fill(cache, encoder, CAPTIONS) == 0


def test_shards_are_unpadded(cache: EmbeddingCache, encoder: CountingEncoder) -> None:
    fill(cache, encoder, CAPTIONS, Pace(shard_size=100))
    tokens = sum(len(encoder.row(caption)) for caption in ["", *CAPTIONS])
    hashes_and_lengths = (len(CAPTIONS) + 1) * (32 + 4)
    payload = tokens * 4 * 2 + hashes_and_lengths
    total = cache.bytes_per_caption * len(cache)
    assert payload < total < payload + 400, "the safetensors header is the only overhead"


def test_an_interrupted_fill_continues_where_it_stopped(tmp_path: Path, encoder: CountingEncoder) -> None:
    def interrupted() -> Iterator[str]:
        yield from CAPTIONS[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(EmbeddingCache(tmp_path, "counting", 4), encoder, interrupted(), Pace(shard_size=2))
    done = list(encoder.encoded)
    assert len(done) == 6, "three shards of two, the null text among them"
    fill(EmbeddingCache(tmp_path, "counting", 4), encoder, CAPTIONS, Pace(shard_size=2))
    assert sorted(encoder.encoded) == sorted(["", *CAPTIONS]), "nothing twice"
    assert torch.equal(
        EmbeddingCache(tmp_path, "counting", 4).get(CAPTIONS).tokens,
        encoder.encode(CAPTIONS).to(dtype=torch.bfloat16).tokens,
    )


def test_a_fill_that_is_asked_to_stop_keeps_its_embeddings_and_reads_no_further(tmp_path: Path) -> None:
    """Told so in the second slice of 16 captions, in the middle of a shard."""
    captions = [f"caption {number}" for number in range(100)]
    encoder, read = CountingEncoder(), []
    stream = (read.append(caption) or caption for caption in captions)

    def stopped() -> bool:
        return len(encoder.encoded) > 16

    added = fill(EmbeddingCache(tmp_path, "counting", 4), encoder, stream, Pace(shard_size=50, stopped=stopped))
    assert (added, len(EmbeddingCache.open(tmp_path)), len(read)) == (32, 32, 50)
    assert not list(tmp_path.glob("complete-*"))
    assert fill(EmbeddingCache.open(tmp_path), CountingEncoder(), captions) == 101 - 32
    assert (tmp_path / "complete-0-of-1").exists()


def test_a_cache_says_which_shares_of_it_are_complete(tmp_path: Path) -> None:
    def fill_share(process: int, processes: int, captions: list[str] = CAPTIONS) -> set[str]:
        fill(EmbeddingCache(tmp_path, "counting", 4), CountingEncoder(), captions, share=(process, processes))
        return {path.name for path in tmp_path.glob("complete-*")}

    def broken() -> Iterator[str]:
        raise KeyboardInterrupt
        yield

    assert fill_share(0, 2) == {"complete-0-of-2"}
    assert fill_share(1, 2) == {"complete-0-of-2", "complete-1-of-2"}
    with pytest.raises(KeyboardInterrupt):
        fill_share(1, 2, broken())
    assert fill_share(0, 2) == {"complete-0-of-2"}
    assert fill_share(0, 1) == {"complete-0-of-1"}


def test_a_shard_that_a_crash_left_outside_the_index_is_replaced(tmp_path: Path, encoder: CountingEncoder) -> None:
    cache = EmbeddingCache(tmp_path, "counting", 4)
    fill(cache, encoder, CAPTIONS[:2])
    (tmp_path / "shard-0-00001.safetensors").write_bytes(b"half of a")
    fill(cache, encoder, CAPTIONS)
    assert not EmbeddingCache(tmp_path, "counting", 4).missing(CAPTIONS)


def test_shards_are_filled_from_a_stream_one_at_a_time(cache: EmbeddingCache, encoder: CountingEncoder) -> None:
    ahead = []

    def stream() -> Iterator[str]:
        for caption in CAPTIONS:
            yield caption
            ahead.append(len(ahead) + 1 - len(cache))

    fill(cache, encoder, stream(), Pace(shard_size=3))
    assert max(ahead) <= 3


def test_missing_names_each_once_in_order(cache: EmbeddingCache) -> None:
    cache.add(["b"], [torch.zeros(2, 4)])
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]
    assert ("b" in cache, "a" in cache, len(cache)) == (True, False, 1)


def test_adding_again_writes_nothing(cache: EmbeddingCache) -> None:
    cache.add(["a"], [torch.zeros(1, 4)])
    cache.add(["a"], [torch.ones(1, 4)])
    assert len(list(cache.folder.glob("shard-*"))) == 1
    assert cache.get(["a"]).tokens.sum() == 0


def test_a_prompt_that_is_not_there_is_named(cache: EmbeddingCache) -> None:
    with pytest.raises(CascadeError, match=r"no embedding of 'a fox'.*cascade encode"):
        cache.get(["a fox"])


def test_a_cache_can_be_opened_without_knowing_its_encoder(tmp_path: Path) -> None:
    cache = EmbeddingCache.open(_filled(tmp_path))
    assert (cache.fingerprint, cache.dim, len(cache)) == ("counting", 4, len(CAPTIONS) + 1)


def test_a_cache_of_another_encoder_says_how_to_go_on(tmp_path: Path) -> None:
    folder = _filled(tmp_path)
    for fingerprint, dim in (("another", 4), ("counting", 8)):
        with pytest.raises(CascadeError, match=r"another text encoder.*cascade encode"):
            EmbeddingCache(folder, fingerprint, dim)
    with pytest.raises(CascadeError, match="another text encoder"):
        fill(EmbeddingCache.open(folder), CountingEncoder("another"), ["new"])
    with pytest.raises(CascadeError, match="another text encoder"):
        CachedTextEncoder(EmbeddingCache.open(folder), lambda: CountingEncoder("another")).encode(["new"])


def test_a_damaged_or_missing_shard_is_named(tmp_path: Path) -> None:
    folder = _filled(tmp_path)
    shard = folder / "shard-0-00001.safetensors"
    whole = shard.read_bytes()
    for content in (whole[:-10], whole[:5], b""):
        shard.write_bytes(content)
        with pytest.raises(CascadeError, match=r"shard-0-00001\.safetensors: damaged") as caught:
            EmbeddingCache.open(folder)
        assert "\n" not in str(caught.value)
    save_tensors(shard, {"tokens": torch.zeros(3, 4), "lengths": torch.ones(2).int(), "keys": torch.zeros(2, 32)})
    with pytest.raises(CascadeError, match=r"shard-0-00001\.safetensors: its tensors do not fit together"):
        EmbeddingCache.open(folder)
    shard.unlink()
    with pytest.raises(CascadeError, match=r"shard-0-00001\.safetensors: no such file"):
        EmbeddingCache.open(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 1}', '{"format": 1, "encoder": "x", "dim": null, "shards": []}']
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    folder = _filled(tmp_path)
    (folder / "index.json").write_text(text)
    with pytest.raises(CascadeError, match=r"index\.json: "):
        EmbeddingCache.open(folder)


def test_an_index_of_another_format_is_refused(tmp_path: Path) -> None:
    index = _filled(tmp_path) / "index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    with pytest.raises(CascadeError, match="format 99"):
        EmbeddingCache.open(index.parent)


def test_the_real_encoder_is_loaded_only_for_what_is_missing(tmp_path: Path) -> None:
    loaded: list[CountingEncoder] = []

    def load() -> CountingEncoder:
        loaded.append(CountingEncoder())
        return loaded[-1]

    text = CachedTextEncoder(EmbeddingCache.open(_filled(tmp_path)), load)
    text.encode([*CAPTIONS, ""])
    assert not loaded
    text.encode([CAPTIONS[0], "new", "new"])
    text.encode(["newer"])
    assert [encoder.encoded for encoder in loaded] == [["new", "newer"]]
    text.release()
    assert loaded[0].released
    text.encode(CAPTIONS)
    assert len(loaded) == 1


def test_whether_a_caption_was_cached_changes_nothing(tmp_path: Path) -> None:
    prompts = [CAPTIONS[3], "", CAPTIONS[1], CAPTIONS[3]]
    empty = CachedTextEncoder(EmbeddingCache(tmp_path / "none", "counting", 4), CountingEncoder)
    full = CachedTextEncoder(EmbeddingCache.open(_filled(tmp_path)), CountingEncoder)
    half_cache = EmbeddingCache(tmp_path / "half", "counting", 4)
    fill(half_cache, CountingEncoder(), CAPTIONS[:2])
    results = [text.encode(prompts) for text in (empty, full, CachedTextEncoder(half_cache, CountingEncoder))]
    assert results[0].tokens.dtype == torch.float32
    assert all(torch.equal(result.tokens, results[0].tokens) for result in results)
    assert all(torch.equal(result.mask, results[0].mask) for result in results)


def test_captions_made_on_the_fly_do_not_grow_the_cache_but_fill_does(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "cache", "counting", 4)
    text = CachedTextEncoder(cache, CountingEncoder)
    text.encode(["made on the fly"])
    assert (len(cache), cache.bytes_per_caption) == (0, 0)
    assert not cache.folder.exists()
    fill(cache, text, ["made on the fly"])
    assert "made on the fly" in cache


def test_an_encoder_goes_where_the_cache_before_it_is_sent(tmp_path: Path) -> None:
    loaded = CountingEncoder()
    text = CachedTextEncoder(EmbeddingCache.open(_filled(tmp_path)), lambda: loaded).to("cpu")
    text.encode(["new"])
    assert loaded.device == "cpu"


def test_noted_settings_are_read_again_and_kept_when_the_cache_grows(tmp_path: Path) -> None:
    cache = EmbeddingCache.open(_filled(tmp_path))
    assert cache.settings is None
    cache.note_settings({"encoder": "here"})
    cache.add(["more"], [torch.zeros(1, 4)])
    assert EmbeddingCache.open(cache.folder).settings == {"encoder": "here"}


# --- several processes, and very many captions ------------------------------------------------------------


def test_processes_share_the_captions_without_overlap_or_loss(tmp_path: Path) -> None:
    """Both opened the cache while it was empty, as processes of one launch do."""
    captions = [f"caption {number}" for number in range(50)]
    caches = [EmbeddingCache(tmp_path, "counting", 4) for _ in range(2)]
    encoders = [CountingEncoder(), CountingEncoder()]
    for process in (1, 0):
        fill(caches[process], encoders[process], captions, Pace(shard_size=8), share=(process, 2))
    assert sorted(encoders[0].encoded + encoders[1].encoded) == sorted(["", *captions])
    assert min(len(encoder.encoded) for encoder in encoders) > 10
    whole = EmbeddingCache(tmp_path, "counting", 4)
    assert torch.equal(whole.get(captions).tokens, encoders[0].encode(captions).to(dtype=torch.bfloat16).tokens)
    again = CountingEncoder()
    fill(whole, again, captions, share=(0, 1))
    assert again.encoded == [], "another number of processes goes on where those stopped"


def test_two_that_fill_under_one_number_are_kept_apart(tmp_path: Path) -> None:
    first, second = (EmbeddingCache(tmp_path, "counting", 4) for _ in range(2))
    with first.alone(0):
        with pytest.raises(CascadeError, match="another process is filling it"):
            fill(second, CountingEncoder(), CAPTIONS)
        fill(second, CountingEncoder(), CAPTIONS, share=(1, 2))
    fill(second, CountingEncoder(), CAPTIONS)
    assert not EmbeddingCache(tmp_path, "counting", 4).missing(CAPTIONS)


def test_a_writer_that_did_not_see_the_shards_of_others_replaces_none(tmp_path: Path) -> None:
    caches = [EmbeddingCache(tmp_path, "counting", 4) for _ in range(3)]
    for cache, caption in zip(caches, "abc", strict=True):
        cache.add([caption], [torch.full((1, 4), float(ord(caption)))])
    whole = EmbeddingCache.open(tmp_path)
    assert [float(row[0, 0]) for row in whole.get(["a", "b", "c"]).rows()] == [97, 98, 99]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_cache import CountingEncoder
from cascade.text.cache import EmbeddingCache
from cascade.text.cached import Pace, fill
process, left = int(sys.argv[1]), int(sys.argv[2])
encoder = CountingEncoder()
class Killed(CountingEncoder):
    def encode(self, prompts, batch_size=1):
        if len(self.encoded) >= left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(prompts, batch_size)
captions = [f"caption {{number}}" for number in range(200)]
fill(EmbeddingCache(sys.argv[3], "counting", 4), Killed(), captions, Pace(shard_size=8), share=(process, 2))
"""


@pytest.mark.slow
def test_a_fill_by_two_processes_that_are_killed_ends_whole(tmp_path: Path) -> None:
    """Real processes: they write at once, are killed in the middle, and go on."""
    code = KILLED.format(path=[str(Path(__file__).parent), str(Path(cascade.__file__).parents[1])])
    for left in (20, 60, 10_000):
        running = [
            subprocess.Popen([sys.executable, "-c", code, str(process), str(left), str(tmp_path)])
            for process in range(2)
        ]
        codes = [process.wait(timeout=300) for process in running]
    assert codes == [0, 0]
    captions = [f"caption {number}" for number in range(200)]
    whole = EmbeddingCache.open(tmp_path)
    assert len(whole) == 201
    assert torch.equal(whole.get(captions).tokens, CountingEncoder().encode(captions).to(dtype=torch.bfloat16).tokens)


def test_hashes_with_equal_prefixes_are_distinguished() -> None:
    """Their first 8 bytes are what is sorted."""
    keys = [bytes([*range(8), *([number] * 24)]) for number in range(5)]
    lookup = Lookup()
    for key, length in zip(keys[:4], (3, 1, 4, 2), strict=True):
        lookup.add_shards([(torch.tensor([list(key)], dtype=torch.uint8), torch.tensor([length], dtype=torch.int32))])
    assert [lookup.find(key) for key in keys] == [*(Place(n, 0, length) for n, length in enumerate((3, 1, 4, 2))), None]


def test_places_follow_from_the_lengths_before() -> None:
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (1000,), generator=rng, dtype=torch.int32)
    keys = torch.randint(0, 256, (1000, 32), generator=rng, dtype=torch.uint8)
    lookup = Lookup()
    lookup.add_shards([(keys[:400], lengths[:400]), (keys[400:], lengths[400:])])
    assert len(lookup) == 1000
    for row in (0, 399, 400, 999):
        shard = int(row >= 400)
        start = int(lengths[400 * shard : row].sum())
        assert lookup.find(bytes(keys[row].tolist())) == Place(shard, start, int(lengths[row]))


def test_another_process_finds_what_was_there_and_says_where_something_is_missing(
    cache: EmbeddingCache, encoder: CountingEncoder
) -> None:
    """A cache that travels is opened anew, by its folder."""
    fill(cache, encoder, CAPTIONS)
    travelled = pickle.loads(pickle.dumps(cache))
    found, expected = travelled.find(CAPTIONS[:3]), cache.get(CAPTIONS[:3])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert travelled.find([CAPTIONS[0], "never seen"]) is None
