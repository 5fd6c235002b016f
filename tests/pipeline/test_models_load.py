"""Checkpoints: made by seed, saved whole, loaded whole, found where the configuration says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from configs.model import FirstModelConfig, ModelConfig
from pipeline.models.tokenizer import byte_tokenizer, load_tokenizer
from pipeline.weights import shards
from pipeline.weights.export import export_checkpoint
from pipeline.weights.fill import layers
from pipeline.weights.fresh import create_model
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import load_model, save_hf
from pipeline.weights.resolve import resolve_model
from rollout.checkpoint import checkpoint_shapes, eos_ids
from tests.rollout.tiny import YARN, yarn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_model("tiny", 0, tmp_path_factory.mktemp("models") / "tiny")


def in_parts(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Its weights by checkpoint name, a layer at a time."""
    return (checkpoint_tensors(model, layer) for layer in layers(model))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def tied_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_fresh_weights_depend_on_the_seed_alone(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, other = create_model("tiny", 0, tmp_path / "again"), create_model("tiny", 1, tmp_path / "other")
    assert torch.equal(torch.get_rng_state(), state), "making a model must not touch the caller's random numbers"
    assert (again / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (tiny / "model.safetensors").read_bytes()


def test_fresh_checkpoint_is_what_an_engine_reads(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    for expert in range(8):
        assert weights[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"].shape == (64, 128)
    router = weights["model.layers.1.mlp.gate.weight"]
    assert 0.015 < router.std() < 0.025
    assert weights["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (8,)
    config = json.loads((tiny / "config.json").read_text())
    assert config["topk_method"] == "noaux_tc"
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    tokenizer = load_tokenizer(tiny)
    assert config["vocab_size"] == len(tokenizer)
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "'model_type'"),
        ('{"model_type": "deepseek_v4_tiny"}', "'model_type'"),
        ('{"hidden_size": 8}', "'model_type'"),
        ('{"model_type": "llama", "vocab_size": 100}', "vocab_size=100 .*264"),
    ],
)
def test_bad_architecture_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "model.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        create_model(str(file), 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'moe_25m', 'tiny'"):
        create_model("tinny", 0, tmp_path / "out")


def test_moe_survives_saving_whole_and_in_parts(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny, "float32")
    for parts in (None, in_parts(model)):
        folder = save_hf(model, byte_tokenizer(), tmp_path / "hf", parts)
        assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
        assert (folder / "config.json").read_bytes() == (tiny / "config.json").read_bytes()
        assert torch.equal(logits(load_model(folder, "float32")), logits(model))


def test_a_large_model_is_written_in_shards_as_it_comes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1_000_000)
    model = load_model(tiny, "float32")
    folder = tmp_path / "hf"
    seen: list[int] = []

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        """Parts in one memory, as gathered layers are."""
        for part in in_parts(model):
            seen.append(len(list((tmp_path / ".hf.partial").glob("*.partial"))))
            again = {name: tensor.clone() for name, tensor in part.items()}
            yield again
            for tensor in again.values():
                tensor.zero_()

    save_hf(model, byte_tokenizer(), folder, parts())
    assert seen[0] == 0 and seen[-1] >= 5  # files are there before the last part is asked for
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files][:2] == [f"model-0000{n}-of-{len(files):05d}.safetensors" for n in (1, 2)]
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 1_000_000 for file in files)
    assert checkpoint_shapes(folder) == checkpoint_shapes(tiny)
    assert torch.equal(logits(load_model(folder, "float32")), logits(model))
    assert not list(folder.glob("*.partial"))

    export_checkpoint(folder, tmp_path / "fp8", "fp8")
    export_checkpoint(tiny, tmp_path / "fp8-of-one", "fp8")
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    sizes = {
        file: {name: tensor.nbytes for name, tensor in load_file(tmp_path / "fp8" / file).items()}
        for file in set(index["weight_map"].values())
    }
    assert index["weight_map"] == {name: file for file, held in sizes.items() for name in held}
    assert index["metadata"]["total_size"] == sum(sum(held.values()) for held in sizes.values())
    assert checkpoint_shapes(tmp_path / "fp8") == checkpoint_shapes(tmp_path / "fp8-of-one")


def test_tied_embeddings_survive(tmp_path: Path) -> None:
    model = tied_llama()
    again = load_model(save_hf(model, byte_tokenizer(), tmp_path / "hf"), "float32")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model))


def test_yarn_goes_through_loading_and_saving_unchanged(tmp_path: Path) -> None:
    """From DeepSeek's own form of config.json to what `transformers` and vLLM read of ours."""
    first = yarn(0)
    folder = save_hf(first, byte_tokenizer(), tmp_path / "first")
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(settings | {"rope_scaling": YARN, "rope_theta": 10000}))
    model = load_model(folder, "float32")
    wanted = {"rope_type" if key == "type" else key: value for key, value in YARN.items()}
    for config in (model.config, AutoConfig.from_pretrained(save_hf(model, byte_tokenizer(), tmp_path / "again"))):
        assert wanted.items() <= config.rope_parameters.items() and config.rope_parameters["rope_theta"] == 10000
        assert config.max_position_embeddings == 160
    assert torch.equal(logits(model), logits(first))


def test_dtype_is_as_asked(tiny: Path) -> None:
    assert load_model(tiny, "bfloat16").lm_head.weight.dtype == torch.bfloat16


def test_saving_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "stale.safetensors").write_text("old")
    save_hf(tied_llama(), byte_tokenizer(), folder)
    assert "stale.safetensors" not in {file.name for file in folder.iterdir()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = save_hf(tied_llama(), byte_tokenizer(), tmp_path / "hf")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(AttributeError):
        save_hf(tied_llama(), None, folder)  # type: ignore[arg-type]
    assert (folder / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_checkpoint_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    folder = save_hf(tied_llama(), byte_tokenizer(), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, "float32")


def test_checkpoint_with_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    folder = save_hf(tied_llama(), byte_tokenizer(), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors") | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="unexpected_keys"):
        load_model(folder, "float32")


def test_resolve_makes_a_fresh_model_once(tmp_path: Path) -> None:
    config = FirstModelConfig(init_config="tiny", init_seed=3)
    folder = resolve_model(config, workdir=tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(config, workdir=tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    other_seed = FirstModelConfig(init_config="tiny", init_seed=4)
    assert resolve_model(other_seed, workdir=tmp_path) != folder


def test_resolve_paths(tiny: Path, tmp_path: Path) -> None:
    def resolve(path: str) -> Path:
        return resolve_model(ModelConfig(path=path), workdir=tmp_path)

    assert resolve(str(tiny)) == tiny
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        resolve(str(tiny / "config.json"))
    with pytest.raises(ValueError, match="neither a folder"):
        resolve("/no/such/folder")


CHATML = "{% for m in messages %}{{ START + m.role + '\n' + m.content + '<|spare_1|>\n' }}{% endfor %}".replace(
    "START", "'<|spare_0|>'"
)


@pytest.mark.parametrize(
    ("template", "before", "ends", "eos"),
    [
        (None, None, 2, "<eos>"),  # the byte tokenizer's own, which ends a turn with <eos>
        (CHATML, None, [7, 2], "<|spare_1|>"),
        (CHATML, 2, [7, 2], "<|spare_1|>"),
        (CHATML, [5, 7], [7, 2, 5], "<|spare_1|>"),
        (CHATML + "{{ eos_token }}", 2, [7, 2], "<eos>"),  # which needs it to be what it is
        ("{{ messages[0].content }}", 2, 2, "<eos>"),  # ends a turn with nothing
    ],
)
def test_an_export_ends_where_its_template_ends_a_turn(
    tmp_path: Path, template: str | None, before: int | list[int] | None, ends: int | list[int], eos: str
) -> None:
    model, tokenizer = tied_llama(), byte_tokenizer()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = before
    tokenizer.chat_template = template or tokenizer.chat_template
    folder = save_hf(model, tokenizer, tmp_path / "hf")
    exported = load_tokenizer(folder)
    assert (exported.eos_token, exported.chat_template) == (eos, tokenizer.chat_template)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends
    assert eos_ids(folder) == (ends if isinstance(ends, list) else [ends])
    again = save_hf(load_model(folder, "float32"), exported, tmp_path / "again")
    assert eos_ids(again) == eos_ids(folder)


def test_an_exported_model_stops_by_itself(tmp_path: Path) -> None:
    model, tokenizer = tied_llama(), byte_tokenizer()
    tokenizer.chat_template = CHATML
    with torch.no_grad():  # the end of a turn is what it always says
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.ones_like(model.model.embed_tokens.weight) * -1.0)
        model.model.embed_tokens.weight[7] = 1.0
    exported = load_model(save_hf(model, tokenizer, tmp_path / "hf"), "float32")
    prompt = torch.tensor([[7, 7]])
    assert exported.generate(prompt, max_new_tokens=5, do_sample=False).tolist() == [[7, 7, 7]]


def test_a_checkpoint_without_generation_config_names_no_ends(tmp_path: Path) -> None:
    assert eos_ids(tmp_path) == []
    (tmp_path / "generation_config.json").write_text("{}")
    assert eos_ids(tmp_path) == []
