"""What is advised, that nothing usual is, and that what is to be tried can be."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.config.loader import example_files
from gptcli.config.schema import Config
from gptcli.data.loader import Part
from gptcli.data.presets import PRESETS
from gptcli.data.shards import Counts, Manifest, Recipe, TokenizerRecord
from gptcli.tokenizers.base import ByteTokenizer
from gptcli.training.advice import Advice, advise, usual_lr
from gptcli.training.memory import ModelSize, model_size
from gptcli.training.spec import RunSpec, with_train

USUAL = {
    "n_params": 124_000_000, "train_tokens": 10**9, "val_tokens": 10**7, "documents": 10**6,
    "tokenizer_size": 50257, "requested_size": None, "max_steps": 1000, "n_windows": 10**6,
    "rows": 8, "n_processes": 1,
}  # fmt: skip
CUDA = "device=cuda"


def settled(*overrides: str) -> Config:
    """Return a configuration about which there is nothing to say, and then `overrides`."""
    usual = ["model.vocab_size=50304", "device=cpu", "train.max_steps=1000"]
    return load_config(None, [*usual, *overrides])


def about(config: Config, counts: dict[str, Any]) -> tuple[Advice, ...]:
    """Return the advice on a configuration as a run settles it."""
    optim = config.optim.model_copy(update={"min_lr": config.min_lr})
    config = config.model_copy(update={"optim": optim})
    config = with_train(config, tokens_per_step=config.tokens_per_step)
    known = {**counts}
    recipe = Recipe.model_construct(
        conversation_format="docstrings" if config.data.source == "stdlib-chat" else None,
        max_vocab_size=known.pop("requested_size"),
        tokenizer=TokenizerRecord(name="x", vocab_size=known.pop("tokenizer_size"), sha256=""),
    )
    tokens = Counts(train=known.pop("train_tokens"), val=known.pop("val_tokens"))
    manifest = Manifest.model_construct(
        recipe=recipe, tokens=tokens, documents=known.pop("documents")
    )
    if config.data.mix is not None:
        known["parts"] = tuple(Part(source.source, Path(source.source), manifest, config)
                               for source in config.data.mix)  # fmt: skip
        known["part_windows"] = (known["n_windows"] - 100, 100)
    n_params = known.pop("n_params")
    size = ModelSize(n_params, n_params, 0, n_params, 0, 0)
    return advise(RunSpec(config, manifest, ByteTokenizer(), size, **known))


def test_there_is_nothing_to_say_about_what_is_usual() -> None:
    assert about(settled(), USUAL) == ()


SITUATIONS: list[tuple[list[str], dict[str, int], str, str]] = [
    (["optim.lr=0.1"], {}, "optim.lr 0.1 is high", "-s optim.lr=0.0006"),
    (["optim.lr=0.1", "optim.min_lr=0.01"], {}, "optim.lr 0.1 is high", "-s optim.min_lr=6e-05"),
    (["optim.lr=1e-6"], {}, "optim.lr 1e-06 is low", "-s optim.lr=0.0006"),
    (["optim.lr=1", "optim.name=muon"], {}, "optim.lr 1 is high", "-s optim.lr=0.003"),
    (["optim.warmup_steps=2000"], {}, "never reaches its peak", "-s optim.warmup_steps=20"),
    (["optim.warmup_steps=900"], {}, "more than half of the run", "-s optim.warmup_steps=20"),
    (["optim.warmup_steps=9", "train.max_steps=9"], {"max_steps": 9}, "never", "warmup_steps=0"),
    ([], {"n_windows": 160}, "50 epochs over 1,000,000,000 tokens without dropout",
     "-s model.dropout=0.1 or -s train.max_steps=80"),
    ([], {"n_windows": 5}, "1,600 epochs over 1,000,000,000 tokens", "-s train.max_steps=2"),
    (["train.max_epochs=9"], {"n_windows": 4, "train_tokens": 4100}, "each step sees most of",
     "-s train.micro_batch_size=1 -s train.tokens_per_step=1024"),
    (["train.max_epochs=9", "train.micro_batch_size=1"], {"n_windows": 1, "rows": 1}, "sees most",
     ""),
    (["model.block_size=256", "data.seq_len=32"], {"n_windows": 10**7},
     "data.seq_len 32 is shorter than model.block_size 256",
     "-s model.block_size=32 or -s model.position=rope"),
    (["model.block_size=256", "data.seq_len=32", "model.n_embd=9", "model.n_head=3"],
     {"n_params": 10**8}, "learned positions beyond 32 are never trained",
     "-s model.block_size=32"),
    (["train.eval_tokens=500000"], {"val_tokens": 30_000},
     "validation of 30,000 tokens for evaluations of 500,000", "-s train.eval_tokens=30000"),
    ([], {"val_tokens": 2048}, "2.0 windows", ""),
    (["train.eval_every=10"], {}, "evaluating 100 times", "-s train.eval_every=814"),
    (["train.eval_every=1000", "data.seq_len=1024", "train.micro_batch_size=1"], {"rows": 1},
     "evaluating once", "-s train.eval_tokens="),
    (["train.save_every=1", "train.eval_tokens=1024", "model.block_size=128"],
     {"n_windows": 10**7}, "saving 1,001 times", "-s train.save_every=20 -s train.eval_every=20"),
    (["train.sample_every=1", "train.eval_tokens=1024", "generate.max_new_tokens=900"], {},
     "sampling 1,000 times", "-s train.sample_every=33"),
    (["generate.max_new_tokens=1000000", "train.eval_tokens=1024"], {}, "sampling once",
     "-s generate.max_new_tokens=100000"),
    ([CUDA, "model.vocab_size=50257"], {}, "vocabulary of 50,257", "-s model.vocab_size=50304"),
    (["model.vocab_size=50176", "tokenizer.name=bpe", "tokenizer.vocab_size=50176"],
     {"tokenizer_size": 1073, "requested_size": 50176},
     "the bpe vocabulary has 1,073 tokens, not the 50,176 requested: the text has no more pairs to"
     " merge; 49,103 rows of the model are never used", "-s model.vocab_size=1088"),
    (["model.vocab_size=1073", "tokenizer.name=bpe"],
     {"tokenizer_size": 1073, "requested_size": 50176}, "not the 50,176 requested", ""),

]  # fmt: skip


@pytest.mark.parametrize(("overrides", "counts", "what", "remedy"), SITUATIONS)
def test_each_says_what_and_why_and_what_to_try_is_accepted(
    overrides: list[str], counts: dict[str, Any], what: str, remedy: str
) -> None:
    found = [one for one in about(settled(*overrides), USUAL | counts)
             if what in str(one)]  # fmt: skip
    assert len(found) == 1, about(settled(*overrides), USUAL | counts)
    (one,) = found
    assert remedy in one.set and bool(remedy) == bool(one.set) and "\n" not in str(one)
    assert str(one).endswith(f"; try: {one.set}") or not one.set
    for attempt in one.set.split(" or ") if one.set else []:
        words = attempt.split()
        assert words[::2] == ["-s"] * (len(words) // 2)
        tried = settled(*overrides, *words[1::2])
        rows = tried.rows // counts.get("n_processes", 1)
        more = {"rows": rows} if "micro_batch_size" in attempt else {}
        more |= {"max_steps": tried.train.max_steps} if "max_steps" in attempt else {}
        again = about(tried, USUAL | counts | more)
        if "dropout" not in attempt and "tokens, not" not in what:
            assert what not in " ".join(map(str, again)), "it helps"


@pytest.mark.parametrize(
    "deliberate", ["model.dropout=0.1", "train.max_epochs=50", "data.val_fraction=0"]
)
def test_who_repeats_the_text_on_purpose_is_not_told_so(deliberate: str) -> None:
    counts = USUAL | {"n_windows": 160}
    if deliberate.startswith("data"):
        counts = counts | {"val_tokens": 0}
    assert not [one for one in about(settled(deliberate), counts) if "epochs" in one.what]


def test_a_gpu_is_not_spoken_of_where_there_is_none() -> None:
    assert about(settled("model.vocab_size=50257"), USUAL) == ()
    one = settled("train.micro_batch_size=1", "train.eval_tokens=1024")
    assert about(one, USUAL | {"rows": 1}) == ()
    assert about(settled(CUDA, "model.vocab_size=257"), USUAL) == ()


def test_fine_tuning_may_be_slow_but_not_fast() -> None:
    tuned = settled("model.init_from=gpt2", "optim.lr=1e-6")
    assert not any("optim.lr" in one.what for one in about(tuned, USUAL))
    fast = about(settled("model.init_from=gpt2", "optim.lr=0.1"), USUAL)
    assert any("is high" in one.what for one in fast)


def test_the_usual_rate_falls_with_size_as_published() -> None:
    sizes = (10**6, 10**7, 10**8, 10**9, 10**12)
    rates = [usual_lr(size) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert usual_lr(85_000_000) == pytest.approx(6.9e-4, rel=0.01)
    assert usual_lr(10**12) == 6e-5


# Tokens to train on, to validate on, and documents of the examples' own data: as published, as
# prepared here, or, where the text is the user's, a megabyte of English.
DATA = {
    "benchmark-char": (11_000_000, 1_200_000, 1_400),
    "chat-stdlib": (389_834, 24_544, 7_329),
    "mix-stdlib": (3_330_000, 356_700, 1_401),
    "finetune-gpt2": (301_966, 36_059, 1),
    "gpt2-8head": (9_035_000_000, 4_500_000, 8_013_769),
    "input-txt": (270_000, 0, 1),
    "modern-124m": (10_300_000_000, 5_000_000, 14_868_862),
    "openwebtext-char": (1_000_000, 110_000, 2),
    "openwebtext": (9_035_582_198, 4_434_897, 8_013_769),
    "overfit": (20_500, 0, 1),
    "quickstart": (3_300_000, 353_375, 1_400),
    "small-text": (320_000, 36_000, 1),
    "shakespeare-char": (1_003_854, 111_540, 1),
    "stdlib-10min": (3_077_228, 353_375, 812),
    "tinystories-124m": (425_000_000, 47_000_000, 2_119_719),
    "tinystories-large": (425_000_000, 47_000_000, 2_119_719),
    "tinystories-small": (425_000_000, 47_000_000, 2_119_719),
    "wikipedia": (4_600_000_000, 2_300_000, 6_407_814),
}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}


def on_its_data(name: str, device: str) -> Iterator[Advice]:
    """Yield the advice on an example that is trained on its own data."""
    train, val, documents = DATA[name]
    config = load_config(name, [f"device={device}", "dtype=float32"])
    own = {"gpt2": 50257, "bytes": 257, "char": 100}.get(config.tokenizer.name)
    size = own or config.tokenizer.vocab_size or 4096
    shape = GPT2 if config.model.init_from == "gpt2" else {}
    if config.model.init_from in DATA:  # the run of another example
        shape = load_config(config.model.init_from).model.model_dump(
            exclude={"init_from", "vocab_size"}
        )
    more = {"vocab_size": config.model.vocab_size or size, **shape}
    config = config.model_copy(update={"model": config.model.model_copy(update=more)})
    n_windows = max(1, (train - 1 - config.seq_len) // config.stride)
    per_step = config.tokens_per_step // config.seq_len
    epochs = int((config.train.max_epochs or 1) * n_windows / per_step)
    counts = {
        "n_params": model_size(config).parameters, "train_tokens": train, "val_tokens": val,
        "documents": documents, "tokenizer_size": size,
        "requested_size": config.tokenizer.vocab_size,
        "max_steps": config.train.max_steps or epochs,
        "n_windows": n_windows, "rows": config.rows, "n_processes": 1,
    }  # fmt: skip
    yield from about(config, counts)


def test_the_data_of_every_example_are_known() -> None:
    assert set(DATA) == {path.stem for path in example_files()}
    assert PRESETS["openwebtext"].expected.gpt2_tokens == sum(DATA["openwebtext"][:2])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", DATA)
def test_no_shipped_example_needs_advice(name: str, device: str) -> None:
    assert list(on_its_data(name, device)) == []
