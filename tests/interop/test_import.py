"""Weights of transformers in our network: the same logits, whatever way they are stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcli.config import ModelConfig
from gptcli.errors import CheckpointError
from gptcli.interop.hf_weights import GPT2_REVISIONS
from gptcli.interop.names import GPT2, from_format, to_format
from gptcli.interop.pretrained import open_pretrained
from gptcli.model import GPT
from gptcli.runs.find import find_checkpoint
from support.pretrained import KINDS, difference, edit_json, gpt2, ours_of, shaken

Saved = Callable[..., tuple[Any, Path]]
# gpt2, medium, large and xl with an eighth of the blocks and four dimensions a head.
SHAPES = [(2, 12, 48), (3, 16, 64), (4, 20, 80), (6, 25, 100)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind: str, saved: Saved) -> None:
    theirs, folder = saved(kind)
    assert difference(theirs, ours_of(folder)) < 1e-4


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), SHAPES)
def test_the_four_shapes_of_gpt2(tmp_path: Path, n_layer: int, n_head: int, n_embd: int) -> None:
    theirs = shaken(gpt2(n_layer, n_head, n_embd))
    theirs.save_pretrained(tmp_path / "theirs")
    assert difference(theirs, ours_of("theirs")) < 1e-4


def test_the_true_shape_of_gpt2_both_ways() -> None:
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    theirs = gpt2(**shape, n_positions=1024).eval()
    config = ModelConfig(**shape)
    with torch.device("meta"):
        ours = GPT(config)
    names = [name for name, _ in ours.named_parameters()]
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() == 124_439_808
    weights = from_format(theirs.state_dict(), names, GPT2)
    ours.load_state_dict(weights, strict=False, assign=True)
    ours.lm_head.weight = ours.wte.weight
    assert difference(theirs, ours.eval(), 50257, 64) < 1e-4
    with torch.device("meta"):
        again = gpt2(**shape, n_positions=1024).eval()
    back = to_format(weights, GPT2, config)
    missing, unexpected = again.load_state_dict(back, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and unexpected == []
    again.tie_weights()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters()))  # noqa: B905


def test_weights_in_several_files(saved: Saved) -> None:
    theirs, folder = saved("qwen3", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert difference(theirs, ours_of(folder)) < 1e-4


def test_names_without_prefix_and_masks_as_the_first_gpt2_has_them(saved: Saved) -> None:
    theirs, folder = saved("gpt2")
    file = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    bare["h.0.attn.bias"] = bare["h.0.attn.bias"].bool()
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, file)
    assert difference(theirs, ours_of(folder)) < 1e-4


def test_half_precision_is_widened(saved: Saved) -> None:
    theirs, folder = saved("llama")
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    ours = ours_of(folder)
    assert ours.wte.weight.dtype == torch.float32
    assert difference(theirs, ours) < 1e-4


def test_the_names_of_gpt2_are_pinned_to_commits() -> None:
    assert list(GPT2_REVISIONS) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert all(len(revision) == 40 for revision in GPT2_REVISIONS.values())


def damage_cut(folder: Path) -> None:
    """Cut the weights off."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def damage_header(folder: Path) -> None:
    """Claim a header of 2^60 bytes."""
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def damage_missing(folder: Path) -> None:
    """Leave a tensor out."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, file)


def damage_surplus(folder: Path) -> None:
    """Add a tensor that GPT-2 does not have."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.moe.weight": torch.ones(2)}, file)


def damage_integers(folder: Path) -> None:
    """Store a weight as integers, as quantized files do."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].to(torch.int8)
    save_file(weights, file)


def damage_pickles(folder: Path) -> None:
    """Leave only pickled weights."""
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damage_nothing(folder: Path) -> None:
    """Leave no weights at all."""
    (folder / "model.safetensors").unlink()


def damage_index(folder: Path) -> None:
    """Name a file outside the folder."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_cut, "model.safetensors is damaged or cut off"),
        (damage_header, "model.safetensors is damaged or cut off"),
        (damage_missing, "tensor transformer.h.1.mlp.c_fc.bias is missing"),
        (damage_surplus, "1 unknown tensor (transformer.h.0.moe.weight)"),
        (damage_integers, "tensor transformer.wte.weight is I8, not floating point"),
        (damage_pickles, "no model.safetensors, only pytorch_model.bin, which may run code"),
        (damage_nothing, "no model.safetensors"),
        (damage_index, "model.safetensors.index.json: damaged"),
    ],
)
def test_damaged_weights_are_refused(
    saved: Saved, damage: Callable[[Path], None], says: str
) -> None:
    _, folder = saved("gpt2")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        ours_of(folder)
    assert says in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "unknown architecture 'mamba'"),
        ({"model_type": None}, "unknown architecture 'None'"),
        ({"activation_function": "silu"}, "activation_function='silu' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_layer": 10**9}, "n_layer: Input should be less than or equal to 1000"),
        ({"n_embd": 2**61}, "n_embd: Input should be less than or equal to 1048576"),
        ({"n_embd": 36}, "tensor transformer.wte.weight is [97, 32], the model needs [97, 36]"),
        ({"n_embd": "32"}, "n_embd"),
        ({"n_embd": None}, "'n_embd' is missing"),
        ({"n_head": 5}, "32 is not divisible by n_head = 5"),
        ({"layer_norm_epsilon": "small"}, "norm_eps: Input should be a valid number"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    saved: Saved, changes: dict[str, Any], says: str
) -> None:
    _, folder = saved("gpt2")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        ours_of(folder)
    assert says in caught.value.message, caught.value.message


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_settings_that_the_network_does_not_have_are_refused(
    saved: Saved, kind: str, changes: dict[str, Any], says: str
) -> None:
    _, folder = saved(kind)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        open_pretrained(str(folder))
    assert says in caught.value.message


def test_a_bias_that_the_description_denies_is_refused(saved: Saved) -> None:
    _, folder = saved("llama-mlp-biased")
    edit_json(folder / "config.json", attention_bias=True, mlp_bias=False)
    with pytest.raises(CheckpointError, match=r"tensor .*mlp.*bias contradicts config\.json"):
        ours_of(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "model.init_from: nowhere: no such weights"),
        ("hf:alone", "expected hf:org/name"),
        (".", "no config.json"),
        ("broken.pt", "broken.pt: damaged, or not a checkpoint"),
        ("some.safetensors", "tensors without the shape"),
    ],
)
def test_names_that_name_nothing(name: str, says: str) -> None:
    Path("broken.pt").write_bytes(b"PK\x03\x04 not really")
    Path("some.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(CheckpointError) as caught:
        open_pretrained(name)
    assert says in caught.value.message


def test_a_run_wins_over_a_folder_or_file_of_its_name_that_is_no_model(
    run: Path, saved: Saved
) -> None:
    best = str(run / "best.pt")
    Path("tiny").write_text("the text it was trained on")
    assert open_pretrained("tiny").place == best
    assert find_checkpoint("tiny") == run / "best.pt"
    Path("tiny").unlink()
    Path("tiny").mkdir()
    assert open_pretrained("tiny").place == best
    _, folder = saved("gpt2")
    Path("tiny").rmdir()
    folder.rename("tiny")
    with pytest.raises(CheckpointError, match="is a run and the folder of a Hugging") as caught:
        open_pretrained("tiny")
    assert caught.value.hint == "for the run: runs/tiny; for the folder: ./tiny"
    assert open_pretrained("runs/tiny").place == best
    assert open_pretrained("./tiny").place == "tiny"


def test_a_name_of_the_hub_without_hf_is_understood() -> None:
    with pytest.raises(CheckpointError) as caught:
        open_pretrained("openai-community/gpt2")
    assert caught.value.hint == "from the Hugging Face Hub: hf:openai-community/gpt2"
    with pytest.raises(CheckpointError) as caught:
        open_pretrained("runs/none.pt")
    assert "hf:org/name" in str(caught.value.hint)
