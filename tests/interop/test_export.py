"""Exports as Hugging Face folders, read by transformers, and what all exports have in common."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import pipeline

from gptcli.config import load_config
from gptcli.config.loader import example_files
from gptcli.errors import CheckpointError, ConfigError, StorageError
from gptcli.interop.export import export
from gptcli.interop.hf import model_card
from gptcli.interop.hf_config import family_of
from gptcli.tokenizers.bpe import train_bpe
from support.pretrained import difference, ours_of

from .exports import LLAMA, SHAPES, TEXT, loaded, trained


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_it_and_has_the_same_logits(name: str) -> None:
    kind, shape = SHAPES[name]
    made = trained(rows=320, **shape)
    done = export(made, "hf", Path("out"))
    theirs = loaded(Path("out"))
    assert type(theirs).__name__ == kind
    assert theirs.get_input_embeddings().weight.shape[0] == 257, "the padding is trimmed"
    assert done.logit_difference < 1e-4
    assert done.parameters == theirs.num_parameters()
    assert f" {done.parameters:,} parameters" in Path("out/README.md").read_text()
    assert difference(made.model, theirs, 257) < 1e-4
    # And back again.
    assert difference(ours_of("out"), theirs, 257) < 1e-4


@pytest.mark.parametrize(
    ("shape", "keys"),
    [
        ({"norm": "rmsnorm"}, ["nearest is gpt2, but model.norm=rmsnorm (not layernorm)"]),
        (LLAMA | {"norm": "layernorm"}, ["nearest is llama, but model.norm=layernorm"]),
        (LLAMA | {"mlp": "gelu"}, ["nearest is llama, but model.mlp=gelu (not swiglu)"]),
        ({"mlp": "swiglu"}, ["model.mlp=swiglu (not gelu"]),
        ({"position": "rope"}, ["model.position=rope (not learned)"]),
        ({"qk_norm": True}, ["model.qk_norm=true"]),
        ({"head_dim": 16}, ["model.head_dim=16 (not 8)"]),
        ({"n_kv_head": 2}, ["model.n_kv_head=2"]),
        ({**LLAMA, "mlp": "relu2"}, ["model.mlp=relu2 (not swiglu)"]),
        ({**LLAMA, "qk_norm": True, "qkv_bias": True}, ["model.qkv_bias=true (not false)"]),
        (
            {**LLAMA, "key_offset": True, "bigram_rows": 64},
            ["model.bigram_rows=64 (not 0)", "model.key_offset=true (not false)"],
        ),
        (
            {"x0_scalars": True, "n_value_embd": 1},
            [
                "nearest is gpt2",
                "model.x0_scalars=true (not false)",
                "model.n_value_embd=1 (not 0)",
            ],
        ),
        ({**LLAMA, "bias": True, "qkv_bias": False}, ["model.qkv_bias=false (not true)"]),
    ],
)
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_no_format_holds_is_refused_by_key(
    shape: dict[str, Any], keys: list[str], to: Any
) -> None:
    tokenizer = train_bpe([TEXT], 300)
    with pytest.raises(ConfigError) as caught:
        export(trained(tokenizer, **shape), to, Path("out"))
    assert all(key in caught.value.message for key in keys), caught.value.message
    assert not Path("out").exists()
    # With the settings of the hint it works.
    found = re.findall(r"-s model\.(\w+)=(\w+)", str(caught.value.hint))
    settings = {key: yaml.safe_load(value) for key, value in found}
    export(trained(tokenizer, **(shape | settings)), to, Path("out"))


def test_every_example_can_be_exported_or_says_with_which_settings() -> None:
    refused = set()
    for path in example_files():
        try:
            family_of(load_config(str(path)).model)
        except ConfigError:
            refused.add(path.stem)
            settings = re.findall(
                r"-s (model\.\w+=\w+)", path.read_text().partition("# Export: ")[2]
            )
            family_of(load_config(str(path), settings).model)
    assert refused == {"quickstart", "stdlib-10min", "small-text", "overfit", "benchmark-char"}


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_the_quickstart_with_swiglu_is_exported(to: Any) -> None:
    plain = ("mlp=swiglu", "bigram_rows=0", "n_value_embd=0", "x0_scalars=false",
             "key_offset=false")  # fmt: skip
    config = load_config("quickstart", [f"model.{setting}" for setting in plain])
    shape = config.model.model_dump(exclude={"vocab_size"})
    done = export(trained(train_bpe([TEXT], 300), **shape), to, Path("out"))
    assert done.family == "qwen3"


def test_the_folder_is_complete_and_says_what_it_is() -> None:
    export(trained(rows=320), "hf", Path("some/folder/mine"))
    folder = Path("some/folder/mine")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    card = (folder / "README.md").read_text()
    for part in ("# mine", "corpus.txt", "5,000", "bytes, 257 tokens", "7 of 8,192 tokens",
                 "2.5000", "random weights", "library_name: transformers"):  # fmt: skip
        assert part in card, part
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["temperature"] == 0.8 and generation["top_p"] == 0.9
    assert generation["top_k"] == 0, "the run samples from all tokens, transformers from 50"
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("shape", [{}, LLAMA], ids=["gpt2", "llama"])
def test_the_default_call_of_a_pipeline_fills_the_context_and_no_more(shape: Any) -> None:
    export(trained(**shape), "hf", Path("out"))
    talk = pipeline("text-generation", model="out")
    for length in (1, 20, 23):
        prompt = talk.tokenizer("x" * length, return_tensors="pt")
        tokens = talk.model.generate(**prompt)[0].tolist()
        assert len(tokens) == 24 or tokens[-1] == 256
        assert talk("x" * length)[0]["generated_text"].startswith("x" * length)
    with pytest.raises(ValueError, match="`max_length` is set to 24"):
        talk("x" * 24)


def test_the_card_names_the_best_loss_only_where_it_is_another_one() -> None:
    made = trained()
    line = {"step": 7, "val_loss": 2.5, "train_loss": 2.25}
    Path("metrics.jsonl").write_text(json.dumps(line) + "\n")
    card = model_card(made, "gpt2", 1, "mine")
    assert "| validation loss | 2.5000" in card and "| training loss | 2.2500" in card
    assert "best loss" not in card
    Path("metrics.jsonl").write_text(json.dumps(line | {"val_loss": 2.75}) + "\n")
    assert "best loss so far (step 7) | 2.5000" in model_card(made, "gpt2", 1, "mine")


def test_what_is_in_the_way_is_kept() -> None:
    made = trained()
    Path("out").mkdir()
    export(made, "hf", Path("out"))  # an empty folder is not in the way
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out is not empty"):
        export(made, "hf", Path("out"))
    export(made, "hf", Path("out"), force=True)
    assert not Path("out/mine.txt").exists() and Path("out~1/mine.txt").read_text() == "mine"
    Path("file").write_text("mine")
    for to in ("hf", "nanogpt"):
        with pytest.raises(ConfigError, match="file exists"):
            export(made, to, Path("file"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="out is a folder"):
        export(made, "nanogpt", Path("out"), force=True)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
@pytest.mark.parametrize("to", ["hf", "gguf", "nanogpt"])
def test_every_name_can_be_exported_to_that_a_file_can_have(to: Any) -> None:
    made = trained(train_bpe([TEXT], 300))
    for name in (b"plain", b"\xff\xfe", b"x" * 255):
        out = Path(os.fsdecode(name))
        export(made, to, out)
        assert out.exists() and set(Path().iterdir()) == {out, Path("made.pt")}
        shutil.rmtree(out) if to == "hf" else out.unlink()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("to", ["hf", "gguf", "nanogpt"])
@pytest.mark.parametrize("name", ["", ".", "..", "x" * 300])
def test_a_name_that_nothing_can_have_is_refused(to: Any, name: str, force: bool) -> None:
    made = trained(train_bpe([TEXT], 300))
    with pytest.raises((ConfigError, StorageError)) as caught:
        export(made, to, Path(name), force=force)
    assert "--force" not in (caught.value.hint or "")
    assert list(Path().iterdir()) == [Path("made.pt")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("to", ["hf", "gguf", "nanogpt"])
def test_a_full_disk_leaves_nothing(to: Any) -> None:
    import resource

    made = trained(train_bpe([TEXT], 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(StorageError):
            export(made, to, Path("exports/out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(Path("exports").iterdir()) == []


def test_a_network_with_nan_is_not_exported() -> None:
    made = trained()
    with torch.no_grad():
        made.model.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="reads back"):
        export(made, "hf", Path("out"))
    assert not Path("out").exists()


# The command.


def test_the_command(gpt: Any, run: Path) -> None:
    done = gpt("export", "--to", "hf", "out", "--json")
    assert done.code == 0, done.err
    assert done.json["path"] == "out" and done.json["format"] == "hf"
    assert done.json["family"] == "gpt2" and done.json["logit_difference"] < 1e-4
    card = Path("out/README.md").read_text()
    assert "validation loss" in card and "training loss" in card
    again = gpt("export", "--to", "hf", "out")
    assert again.code == 2 and "out is not empty" in again.err and "--force" in again.err
    forced = gpt("export", "--checkpoint", str(run), "--to", "hf", "out", "--force")
    assert forced.code == 0 and "largest logit difference" in forced.out
    plain = gpt("export", "--to", "nanogpt", "ckpt.pt")
    assert plain.code == 0 and "note: nanoGPT computes the exact GELU" in plain.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--to", "onnx", "out"), 2, "'--to': 'onnx' is not one of 'hf', 'gguf', 'nanogpt'"),
        (("out",), 2, "Missing option '--to'. Choose from: hf, gguf, nanogpt"),
        (("--to", "hf", "out", "--dtype", "float16"), 2, "--dtype: only --to gguf has a choice"),
        (("--to", "gguf", "out"), 2, "tokenizer.name=bytes"),
        (("--to", "hf", "out", "--checkpoint", "nowhere"), 4, "nowhere"),
        (("--to", "hf"), 2, "OUT"),
    ],
)
def test_what_the_command_refuses(
    gpt: Any, run: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    done = gpt("export", *words)
    assert done.code == code and says in done.err, done.err
    assert len(done.err_lines) <= 3 and not Path("out").exists()


def test_an_export_is_a_start_again(gpt: Any, run: Path, data: Path) -> None:
    settings = [
        "model.init_from=out", f"data.dir={data}", "name=again", "train.max_steps=1",
        "train.micro_batch_size=2", "train.eval_tokens=64", "generate.max_new_tokens=2",
        "device=cpu",
    ]  # fmt: skip
    assert gpt("export", "--to", "hf", "out").code == 0
    words = [part for word in settings for part in ("-s", word)]
    done = gpt("train", *words, "--json")
    assert done.code == 0, done.err
