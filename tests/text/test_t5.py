"""The frozen T5 encoder, built tiny from its config and loaded by the real loading code."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_text import make_tiny_t5
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.errors import CascadeError
from cascade.text.t5 import TextEncoder

STRINGS = [
    "a red apple",
    "",
    "   ",
    "two  Blue\tstars\n",
    "🦊 👨‍👩‍👧 🏳️‍🌈",
    "שלום مرحبا",
    "\x00\x01\x07\x7f\u200b\u202e\ufeff",
    "ﬁ Ⅷ ß é 苹果 りんご",
    "</s> <pad> <unk> <extra_id_0> <0x41>",
    "\U0010ffff",
    "\ud83d lone surrogate",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(folder)


def test_importing_the_module_leaves_transformers_out() -> None:
    program = "import sys, cascade.text.t5, cascade.text.cache; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_prompt_embeds_to_the_same_bits_in_any_company(encoder: TextEncoder) -> None:
    alone = encoder.encode(["a red apple"])
    among = encoder.encode(["a blue star of the fox", "a red apple", "", "a red apple"])
    assert torch.equal(among.rows()[1], alone.rows()[0])
    assert torch.equal(among.rows()[3], alone.rows()[0])


def test_batches_give_what_single_prompts_give(encoder: TextEncoder) -> None:
    prompts = ["a red apple", "", "two blue stars of the fox", "fox"]
    single, batched = encoder.encode(prompts), encoder.encode(prompts, batch_size=3)
    assert torch.equal(single.mask, batched.mask)
    # float32 over two layers: sums in another order move the last bits only, and padding must not leak in.
    torch.testing.assert_close(single.tokens, batched.tokens, atol=1e-5, rtol=1e-5)


def test_padding_is_masked_and_zero(encoder: TextEncoder) -> None:
    embeddings = encoder.encode(["", "a red apple"])
    assert embeddings.tokens.shape == (2, 4, 32)
    assert embeddings.mask.tolist() == [[True, False, False, False], [True] * 4]
    assert torch.count_nonzero(embeddings.tokens[~embeddings.mask]) == 0


def test_the_empty_prompt_is_the_end_of_text_alone(encoder: TextEncoder, folder: Path) -> None:
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1]])).last_hidden_state
    assert torch.equal(encoder.encode([""]).tokens, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_the_null_text_may_be_zeros_while_every_other_text_stays(folder: Path, padded: bool) -> None:
    zeros = TextEncoder.from_pretrained(folder, padded=padded, max_length=8, null_text="zeros")
    plain = TextEncoder.from_pretrained(folder, padded=padded, max_length=8)
    prompts = ["", "a fox", "  "]  # the tokenizer drops spaces
    found, usual = zeros.encode(prompts, batch_size=3), plain.encode(prompts, batch_size=3)
    assert torch.equal(found.mask, usual.mask), "as long as it would be"
    assert not found.tokens[[0, 2]].any()
    assert usual.tokens[0].any()
    assert torch.equal(found.tokens[1], usual.tokens[1])
    assert zeros.fingerprint != plain.fingerprint


def test_a_long_prompt_is_cut_and_the_warning_says_where(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder, max_length=4)
    with pytest.warns(UserWarning, match=r"'a red apple of the fox' has 7 tokens.*after 'a red apple', before 'of the"):
        cut = encoder.encode(["a red apple of the fox"])
    assert torch.equal(cut.tokens, encoder.encode(["a red apple"]).tokens)


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("a red apple", ["a red apple"]),
        ("a red apple of the fox", ["a red apple", "of the fox"]),
        ("  a red  apple\nof the fox ", ["a red apple", "of the fox"]),
        ("", [""]),
    ],
)
def test_windows_are_within_the_limit_split_between_words_and_lose_none(
    folder: Path, text: str, windows: list[str]
) -> None:
    encoder = TextEncoder.from_pretrained(folder, max_length=4)
    assert encoder.windows(text) == windows
    encoder.encode(encoder.windows(text))  # none is cut, which would be a warning


def test_a_word_beyond_the_limit_is_a_window_of_its_own_and_of_endless_text_the_first_ones_are_read(
    folder: Path,
) -> None:
    encoder = TextEncoder.from_pretrained(folder, max_length=4)
    assert encoder.windows("a xyzxyzxyz fox") == ["a", "xyzxyzxyz", "fox"]
    with pytest.warns(UserWarning, match="has 100 windows of 4 tokens: the first 32 are read"):
        assert encoder.windows("a red apple " * 100) == ["a red apple"] * 32


def test_a_prompt_of_exactly_max_length_is_whole(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder, max_length=4)  # pytest turns a warning into an error
    assert encoder.encode(["a red apple"]).mask.sum() == 4


@pytest.mark.parametrize("text", STRINGS)
def test_no_string_gives_an_unknown_token(encoder: TextEncoder, text: str) -> None:
    ids = encoder._tokenize(text)
    assert 2 not in ids
    assert ids[-1] == 1
    assert ids.count(1) == 1, "a prompt that spells </s> must not end the text"


def test_no_random_string_gives_an_unknown_token(encoder: TextEncoder) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(chr(rng.randrange(0x110000)) for _ in range(8))
        assert 2 not in encoder._tokenize(text)


def test_distinct_characters_stay_distinct(encoder: TextEncoder) -> None:
    assert encoder._tokenize("🦊") != encoder._tokenize("🐺")


def test_text_that_spells_a_byte_is_not_that_byte(encoder: TextEncoder) -> None:
    assert encoder._tokenize("<0x41>") != encoder._tokenize("A")
    assert len(encoder._tokenize("<0x41>")) == len("▁<0x41>") + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_encoder_loads_to_the_same_embeddings(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    prompts = ["a red apple", "", "🦊 </s>"]
    original = TextEncoder.from_pretrained(folder, dtype=dtype)
    original.save_pretrained(tmp_path / "saved")
    again = TextEncoder.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert torch.equal(original.encode(prompts).tokens, again.encode(prompts).tokens)
    assert again.fingerprint == original.fingerprint


def test_weights_that_bf16_holds_are_saved_in_half_the_bytes(folder: Path, tmp_path: Path) -> None:
    TextEncoder.from_pretrained(folder, dtype=torch.bfloat16).to(dtype=torch.float32).save_pretrained(tmp_path / "t5")
    full, half = ((f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "t5"))
    assert 0.45 * full < half < 0.55 * full


def test_saving_does_not_replace_a_folder_of_other_things(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CascadeError, match="holds other files"):
        encoder.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_encoder_is_frozen_and_gives_no_gradients(encoder: TextEncoder) -> None:
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
    assert not encoder._model.training
    assert not encoder.encode(["a fox"]).tokens.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_encoder_whose_activations_overflow_float16(
    folder: Path, dtype: torch.dtype
) -> None:
    encoder = TextEncoder.from_pretrained(folder)
    for name, weight in encoder._loaded().named_parameters():
        if name.endswith("wo.weight"):
            weight.mul_(3e6)
    plain = encoder.encode(["red apple", ""])
    hidden: list[Tensor] = []
    watched = [
        layer.register_forward_hook(lambda *call: hidden.append(call[2])) for layer in encoder._model.encoder.block
    ]
    with torch.autocast("cpu", dtype):
        inside = encoder.encode(["red apple", ""])
    for hook in watched:
        hook.remove()
    assert max(float(each.abs().max()) for each in hidden) > 65504, "no number of float16"
    assert torch.equal(inside.tokens, plain.tokens)
    assert inside.tokens.isfinite().all()


def test_a_released_encoder_says_what_to_do(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder)
    fingerprint = encoder.fingerprint
    encoder.release()
    with pytest.raises(CascadeError, match=r"released.*from_pretrained"):
        encoder.encode(["a fox"])
    assert (encoder.dim, encoder.fingerprint) == (32, fingerprint)


def test_dtype_and_sizes_are_what_was_asked_for(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder, dtype=torch.bfloat16, max_length=7)
    assert encoder.encode(["a fox"]).tokens.dtype == encoder.dtype == torch.bfloat16
    assert (encoder.dim, encoder.max_length, encoder.device.type) == (32, 7, "cpu")
    tensors = {p.data_ptr(): p.numel() for p in encoder._model.parameters()}
    assert encoder.parameters_count == sum(tensors.values())


def test_fingerprint_is_the_same_in_another_process(encoder: TextEncoder, folder: Path) -> None:
    program = f"from cascade.text.t5 import TextEncoder as T; print(T.from_pretrained({str(folder)!r}).fingerprint)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == encoder.fingerprint
    assert done.stderr == "", "loading is quiet"


def test_fingerprint_changes_with_all_that_changes_an_embedding(
    encoder: TextEncoder, folder: Path, tmp_path: Path
) -> None:
    others = [
        TextEncoder.from_pretrained(folder, max_length=32),
        TextEncoder.from_pretrained(folder, dtype=torch.bfloat16),
        TextEncoder.from_pretrained(folder).to(dtype=torch.bfloat16).to(dtype=torch.float32),
        TextEncoder.from_pretrained(make_tiny_t5(tmp_path / "other_weights", seed=1)),
    ]
    tokenizer = make_tiny_t5(tmp_path / "other_tokenizer") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"Lowercase"', '"NFC"'))
    others.append(TextEncoder.from_pretrained(tokenizer.parent))
    fingerprints = [encoder.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(fingerprints)) == 6, "max_length, dtype, rounded weights, other weights, other tokenizer"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _set(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


BROKEN = {
    "truncated weights": lambda f: _truncate(f / "model.safetensors"),
    "empty weights": lambda f: (f / "model.safetensors").write_bytes(b""),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "pickled weights": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "no config": lambda f: (f / "config.json").unlink(),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "config is no mapping": lambda f: (f / "config.json").write_text("[1]"),
    "another architecture": lambda f: _set(f / "config.json", model_type="bert"),
    "weights of another shape": lambda f: _set(f / "config.json", d_ff=100),
    "weights that lack a layer": lambda f: _set(f / "config.json", num_layers=3),
    "fewer embeddings than tokens": lambda f: _set(f / "config.json", vocab_size=50),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "truncated tokenizer": lambda f: _truncate(f / "tokenizer.json"),
    "a tokenizer without </s>": lambda f: _set(f / "tokenizer.json", post_processor=None),
    "a file instead of a folder": lambda f: f.rename(f.parent / "moved") and f.write_text("hello"),
    "nothing at all": lambda f: f.rename(f.parent / "moved"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line_that_names_it(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_t5(tmp_path / "t5")
    BROKEN[name](folder)
    capfd.readouterr()
    with pytest.raises(CascadeError) as caught:
        TextEncoder.from_pretrained(str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert ";" in message or "," in message, "what is wrong, and the way out"
    assert "\n" not in message
    assert capfd.readouterr() == ("", ""), "the line says it all; transformers' report stays away"


@pytest.mark.parametrize("source", ["./missing", "/missing/t5", "../missing", "a/b/c", "~/missing", "models\\t5"])
def test_what_looks_like_a_path_never_reaches_the_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    with pytest.raises(CascadeError, match="no such folder"):
        TextEncoder.from_pretrained(source)


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CascadeError, match=r"^nobody/no-such-t5: .*check the name and the network") as caught:
        TextEncoder.from_pretrained("nobody/no-such-t5")
    assert "\n" not in str(caught.value)


def test_settings_that_make_no_sense_say_what_to_use(folder: Path) -> None:
    with pytest.raises(CascadeError, match=r"float16 is not supported; use float32 or bfloat16"):
        TextEncoder.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(CascadeError, match="max_length is 0"):
        TextEncoder.from_pretrained(folder, max_length=0)


def test_embeddings_select_and_pad() -> None:
    rows = [torch.full((n, 2), float(n)) for n in (1, 3, 2)]
    embeddings = TextEmbeddings.from_rows(rows)
    assert all(torch.equal(a, b) for a, b in zip(embeddings.rows(), rows, strict=True))
    assert [len(row) for row in embeddings.select([2, 0, 2]).rows()] == [2, 1, 2]
    assert embeddings.padded(5).mask.sum(dim=1).tolist() == [1, 3, 2]
    assert embeddings.to(dtype=torch.bfloat16).mask.dtype == torch.bool
