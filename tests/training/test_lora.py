"""Low-rank adapters: zero at first, the only trained weights, with equal results merged, separate, and in peft."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers_model import STAGES, make_tiny_cascade
from helpers_training import TEXT_DIM, TRANSFORMER, fill, log_entries, micro_config, trainer
from torch import nn

from cascade import CascadePipeline
from cascade.conditioning import Conditioning
from cascade.config.training import LowRankKind
from cascade.errors import CascadeError
from cascade.files.tensors import load_tensors, save_tensors
from cascade.models.network import Network
from cascade.stage import build_stage
from cascade.storage.pipeline import assemble
from cascade.storage.stage import Adapter, load_stage
from cascade.training.state import load_newest, save_state
from cascade.training.weights import add_low_rank, merge_adapter, merged, save_adapter

IF = (
    "stage.schedule={kind: squared_cosine}",
    "stage.model={kind: if_unet, channels: [8], blocks: [1], attention: [true], embedding_dim: 16, text_dim: 16,"
    " context_dim: 32, head_dim: 8, pooling_heads: 2, groups: 4}",
)


def some_conditions() -> Conditioning:
    return Conditioning(torch.randn(2, 3, TEXT_DIM), torch.ones(2, 3, dtype=torch.bool))


def output(network: nn.Module, cond: Conditioning, size: int = 8) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.ones(2, 3, size, size), torch.zeros(2, 1, 1, 1), cond)


def learn(network: nn.Module) -> dict[str, torch.Tensor]:
    """Random differences in place of trained ones; all named weights."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return dict(network.named_parameters())


def network_of(kind: str) -> Network:
    """A network without zeros, the same each time."""
    changes = {"unet": (), "if_unet": IF, "transformer": TRANSFORMER}[kind]
    network = build_stage(micro_config(Path("run"), *changes).stage).network
    fill(network)
    return network.eval()


@pytest.fixture(params=["unet", "if_unet", "transformer"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


FORMS: tuple[LowRankKind, ...] = get_args(LowRankKind)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_nothing_changes_at_first_and_only_differences_learn(kind: str, layers: Any, form: LowRankKind) -> None:
    network = network_of(kind)
    cond = some_conditions()
    before, names = output(network, cond), {name for name, _ in network.named_parameters()}
    add_low_rank(network, 2, layers, kind=form)
    torch.testing.assert_close(output(network, cond), before, rtol=0, atol=1e-5)  # memory layout chooses kernels
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning
    assert all((".lokr_" if form == "lokr" else ".lora_") in name for name in learning)
    assert (".lora_magnitude_vector" in "".join(learning)) == (form == "dora")
    kernels = [parameter for name, parameter in network.named_parameters() if name in learning and parameter.ndim == 4]
    assert bool(kernels) == (layers == "all" and kind != "transformer")  # which has no convolutions
    assert merged(dict(network.named_parameters()), form).keys() == names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_merged_weights_compute_what_the_differences_do(
    kind: str, layers: Any, form: LowRankKind, tmp_path: Path
) -> None:
    """By our sum over named weights, by an adapter's folder, and by peft reading that folder."""
    import peft

    network, cond = network_of(kind), some_conditions()
    plain = output(network, cond)
    add_low_rank(network, 2, layers, kind=form)
    weights = learn(network)
    expected = output(network, cond)
    assert (expected - plain).abs().max() > 1e-3  # fifty times what is tolerated below
    save_adapter(tmp_path / "adapter", weights, 2, form)

    ours, theirs, own = (network_of(kind) for _ in range(3))
    ours.load_state_dict(merged(weights, form))
    merge_adapter(theirs, tmp_path / "adapter")
    assert theirs.state_dict().keys() == ours.state_dict().keys(), "no wrapper is left behind"
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")), own)
    tensors = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(own, {name.removeprefix("base_model.model."): t for name, t in tensors.items()})
    for result in (output(ours, cond), output(theirs, cond), output(own, cond)):
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)  # another order of float sums


def test_each_form_is_its_formula() -> None:
    """Of a 4 x 6 layer: W + BA, W + sqrt(r) BA, m (W + BA) / |W + BA| by rows, W + A kron B."""
    torch.manual_seed(0)
    weight, down, up, lengths = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2), torch.rand(4) + 1
    lora = {"a.base_layer.weight": weight, "a.lora_A.default.weight": down, "a.lora_B.default.weight": up}
    total = weight + up @ down
    torch.testing.assert_close(merged(lora)["a.weight"], total)
    torch.testing.assert_close(merged(lora, "rslora")["a.weight"], weight + 2**0.5 * up @ down)
    dora = merged(lora | {"a.lora_magnitude_vector.default.weight": lengths}, "dora")["a.weight"]
    torch.testing.assert_close(dora.norm(dim=1), lengths)
    torch.testing.assert_close(dora / dora.norm(dim=1, keepdim=True), total / total.norm(dim=1, keepdim=True))
    one, other = torch.randn(2, 3), torch.randn(2, 2)
    base = {"a.base_layer.weight": weight}
    lokr = merged(base | {"a.lokr_w1.default": one, "a.lokr_w2.default": other}, "lokr")["a.weight"]
    blocks = [torch.cat([value * other for value in row], dim=1) for row in one]
    torch.testing.assert_close(lokr, weight + torch.cat(blocks))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_of_each_form_resumes_and_its_adapter_gives_its_stage(tmp_path: Path, form: LowRankKind) -> None:
    changes = ("training.lora_rank=2", "training.lora_layers=all", f"training.lora_kind={form}")
    whole, halves = (micro_config(tmp_path / name, *changes) for name in ("whole", "halves"))
    assert trainer(whole).run()
    assert trainer(micro_config(tmp_path / "halves", *changes, "training.steps=2")).run()
    assert trainer(halves).run(resume=True)
    finished, resumed = (load_stage(tmp_path / name / "stage").network.state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(finished[name], resumed[name]) for name in finished)
    start = build_stage(whole.stage, seed=whole.training.seed).network
    fill(start, seed=whole.training.seed)
    merge_adapter(start, tmp_path / "whole" / "adapter")
    for name, weight in finished.items():
        torch.testing.assert_close(start.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_an_adapter_is_small_and_holds_no_weight_of_the_network(tmp_path: Path) -> None:
    network = network_of("unet")
    add_low_rank(network, 1)
    save_adapter(tmp_path / "adapter", dict(network.named_parameters()), 1)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    tensors = load_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert all(name.startswith("base_model.model.") for name in tensors)


def test_a_run_writes_the_merged_stage_and_the_adapter_apart(tmp_path: Path) -> None:
    config = micro_config(tmp_path / "run", "training.lora_rank=2", "training.lora_layers=all")
    assert trainer(config).run()
    finished = load_stage(tmp_path / "run" / "stage").network.state_dict()
    start = build_stage(config.stage, seed=config.training.seed).network  # as the helper's `trainer` begins
    fill(start, seed=config.training.seed)
    assert not torch.equal(start.state_dict()["stem.weight"], finished["stem.weight"])
    merge_adapter(start, tmp_path / "run" / "adapter")
    for name, weight in finished.items():
        torch.testing.assert_close(start.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_a_run_with_differences_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = ("training.lora_rank=2", "training.lora_layers=all", "training.save_every=2")
    whole, halves = (micro_config(tmp_path / name, *changes) for name in ("whole", "halves"))
    assert trainer(whole).run()
    short = micro_config(tmp_path / "halves", *changes, "training.steps=2")
    assert trainer(short).run()
    assert trainer(halves).run(resume=True)
    first, second = (load_newest(tmp_path / name, config) for name, config in (("whole", whole), ("halves", halves)))
    for part in ("network", "ema", "optimizer"):
        one, other = getattr(first, part), getattr(second, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert log_entries(tmp_path / "whole") == log_entries(tmp_path / "halves")


def test_a_checkpoint_averages_trained_weights_and_one_that_averaged_everything_resumes(tmp_path: Path) -> None:
    changes = ("training.lora_rank=2", "training.lora_layers=all", "training.save_every=2")
    config = micro_config(tmp_path / "run", *changes)
    assert trainer(config).run()
    state = load_newest(tmp_path / "run", config)
    assert state.ema
    assert all(".lora_" in name for name in state.ema)
    assert any(".lora_" not in name for name in state.network)

    short = micro_config(tmp_path / "old", *changes, "training.steps=2")
    assert trainer(short).run()
    begun = load_newest(tmp_path / "old", short)
    save_state(tmp_path / "old", replace(begun, ema=begun.network | begun.ema), short, keep=1)
    assert trainer(micro_config(tmp_path / "old", *changes)).run(resume=True)
    for folder in ("stage/model", "adapter/adapter_model"):
        one, other = (load_tensors(tmp_path / name / f"{folder}.safetensors") for name in ("run", "old"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cascade(tmp_path_factory.mktemp("models") / "tiny")


def adapter_for(model: Path, folder: Path) -> Path:
    """An adapter with random differences for the base stage of a model."""
    network = load_stage(model / "base").network
    add_low_rank(network, 2, "all")
    save_adapter(folder, learn(network), 2)
    return folder


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_pipeline_draws_with_an_adapter_as_with_merged_weights(tmp_path: Path, model: Path, low_memory: bool) -> None:
    folder = adapter_for(model, tmp_path / "adapter")
    prompt, options = "a red fox", {"seed": 1, "until": 8}
    plain = CascadePipeline.from_pretrained(model, device="cpu")(prompt, **options).images[0]
    adapted = CascadePipeline.from_pretrained(model, device="cpu", adapters={"base": folder}, low_memory=low_memory)
    stages = [model / name for name in STAGES]
    assembled = assemble(model / "text_encoder", stages, name="x", license="y", adapters={"base": folder})
    pictures = [drawn(prompt, **options).images[0] for drawn in (adapted, assembled)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert pictures[0].tobytes() != plain.tobytes()


def test_wrong_adapters_are_named(tmp_path: Path, model: Path) -> None:
    folder = adapter_for(model, tmp_path / "adapter")
    with pytest.raises(CascadeError, match="adapters: 'big' is not a stage of this model; it has base, "):
        CascadePipeline.from_pretrained(model, adapters={"big": folder})
    with pytest.raises(CascadeError, match=r"no adapter here; name a folder with adapter_config\.json"):
        CascadePipeline.from_pretrained(model, adapters={"base": tmp_path})
    with pytest.raises(CascadeError, match=r"adapter: (was made for another network|does not fit this network)"):
        merge_adapter(network_of("unet"), folder)
    with pytest.raises(CascadeError, match="adapter: was made for another network, which has "):
        merge_adapter(network_of("if_unet"), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CascadeError, match=r"adapter_model\.safetensors: damaged"):
        merge_adapter(network_of("unet"), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), r"lora_A\.weight is missing \(and \d+ more\)"),
        (lambda tensors: tensors.pop(min(tensors)), r"lora_A\.weight is missing; the weights belong"),
        (lambda tensors: tensors.update({f"{min(tensors)}s": torch.ones(1)}), r"weights is not in this network;"),
        (lambda tensors: tensors.update({min(tensors): torch.ones(2, 2)}), r"has shape \[2, 2\], this network has"),
    ],
    ids=["no tensors", "one missing", "one too many", "another shape"],
)
def test_an_adapter_that_lacks_a_tensor_is_refused_and_never_filled_with_random_numbers(
    tmp_path: Path, model: Path, change: Any, message: str
) -> None:
    folder = adapter_for(model, tmp_path / "adapter")
    tensors = load_tensors(folder / "adapter_model.safetensors")
    change(tensors)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(CascadeError, match=rf"adapter: .*{message}"):
        load_stage(model / "base", adapters=[Adapter(folder)])


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    network = network_of("unet")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CascadeError, match=r"pip install 'cascade-diffusion\[peft\]'"):
        add_low_rank(network, 2)


# --- scaled and mixed at drawing ------------------------------------------------------------------------------------


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """An adapter of random differences for the base stage of a model."""
    network = load_stage(model / "base").network
    add_low_rank(network, 2, "all", seed)
    torch.manual_seed(seed)
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_adapter(folder, weights, 2)
    return folder


def weights_with(model: Path, *adapters: str) -> dict[str, torch.Tensor]:
    pipeline = CascadePipeline.from_pretrained(model, adapters={"base": list(adapters)})
    return pipeline.slots[0].load().network.state_dict()


def test_adapters_are_added_in_proportion_to_their_scales(tmp_path: Path, model: Path) -> None:
    """The weights are linear in the scales, so a mixture is the sum of what each adds alone."""
    one, other = (write_adapter(model, tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    plain, whole_one, whole_other = (weights_with(model, *used) for used in ((), (f"{one}",), (f"{other}:1",)))
    mixed = weights_with(model, f"{one}:0.8", f"{other}:-0.5")
    for name, weight in plain.items():
        expected = weight + 0.8 * (whole_one[name] - weight) - 0.5 * (whole_other[name] - weight)
        torch.testing.assert_close(mixed[name], expected, atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(plain[name], whole_one[name]) for name in plain)


def test_an_adapter_may_be_named_by_its_file_and_scale_nothing_changes_nothing(tmp_path: Path, model: Path) -> None:
    folder = write_adapter(model, tmp_path / "one", 0)
    plain, zero = weights_with(model), weights_with(model, f"{folder / 'adapter_model.safetensors'}:0")
    assert all(torch.equal(plain[name], zero[name]) for name in plain)


def test_adapters_are_in_the_recipe_and_a_picture_is_redrawn_only_with_the_same_ones(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cascade.cli.program import main

    folder = write_adapter(model, tmp_path / "one", 0)
    drawing = ["generate", "a fox", "--model", str(model), "--seed", "1", "--lora", f"base={folder}:0.8", "--quiet"]
    assert main([*drawing, "--out", str(tmp_path / "out")]) == 0
    (picture,) = (tmp_path / "out").glob("0*.png")
    again = ["generate", "--from-image", str(picture), "--model", str(model), "--out", str(tmp_path / "again")]
    assert main([*again, "--lora", f"{folder}:0.8"]) == 0
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    assert main([*again, "--lora", f"{folder}:0.7"]) == 2
    assert main(again) == 2
    assert "was drawn with the adapters" in capsys.readouterr().err
    changed = [text.replace(":0.8", ":0.5") for text in drawing]
    assert main([*changed, "--out", str(tmp_path / "out")]) == 2
    assert "adapters was" in capsys.readouterr().err
