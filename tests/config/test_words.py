"""Options and keys as other programs call them: the hint says what to write here, and it works."""

import shlex
from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.config.reference import keys, suggestion
from gptcli.config.words import KEYS, OPTIONS, note_for


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("train -batch_size 32", "use -s train.micro_batch_size=32"),
        ("train --batch_size=32", "use -s train.micro_batch_size=32"),
        ("train --batch-size 32", "use -s train.micro_batch_size=32"),
        ("train --learning_rate 3e-4", "use -s optim.lr=3e-4"),
        ("train --max_iters 100", "use -s train.max_steps=100"),
        ("train --init_from=resume", "use --resume"),
        ("train --init_from gpt2", "use -s model.init_from=gpt2"),
        ("train --out_dir out", "use -s run_dir=out"),
        ("train --dataset books", "use -s data.source=books"),
        ("train --device cpu", "use -s device=cpu"),
        ("train -config run.yaml", "use --config run.yaml"),
        ("train -seed 5", "use -s seed=5"),
        ("train -resume", "use --resume"),
        ("train --nproc_per_node 2", "use --gpus 2"),
        ("train --shuffle",
         "leave it out: training windows are always drawn in a random order"),
        ("train --gradient_accumulation_steps 8",
         "use -s train.tokens_per_step=VALUE"
         " (in tokens: gradient_accumulation_steps * batch_size * block_size)"),
        ("prepare --train_ratio 0.9",
         "use -s data.val_fraction=VALUE (the rest of it: 0.1 for 0.9)"),
        ("prepare --dataset books", "use -s data.source=books"),
        ("prepare --output data/books", "use --out data/books"),
        ("prepare --num_proc 4", "use --workers 4"),
        ("prepare --num_workers 4", "use --workers 4"),
        ("generate --input x", "use --prompt x"),
        ("generate -prompt x", "use --prompt x"),
        ("generate --start x", "use --prompt x"),
        ("generate -start x", "use --prompt x"),
        ("generate --max_new_tokens 5", "use --max-new-tokens 5"),
        ("generate --max_length 5", "use --max-new-tokens 5"),
        ("generate --num_samples 2", "use --num-samples 2"),
        ("generate --top_k 2", "use --top-k 2"),
        ("generate --ckpt_path a.pt", "use --checkpoint a.pt"),
        ("generate --out_dir=out", "use --checkpoint out"),
        ("eval --dataset data/x", "use --data data/x"),
        ("eval --input x.txt", "use --text x.txt"),
        ("prepare --tokenizer char", "use -s tokenizer.name=char"),
        ("prepare --vocab_size 300 a.txt", "use -s tokenizer.vocab_size=300"),
        ("export --format hf out", "use --to hf"),
        ("train --wandb", "use -s train.loggers=VALUE"
         " (a list: [wandb]; the project is in the variable WANDB_PROJECT)"),
        ("train --fp16", "use -s dtype=VALUE (float16)"),
        ("train run.yaml", "use `gpt train -c run.yaml`"),
        ("generate --model gpt2 'Hi there'", "use --checkpoint gpt2"),
        ("generate --top-k 5 --model gpt2 -p hi --max_length=5", "use --checkpoint gpt2"),
    ],
)  # fmt: skip
def test_what_to_write_for_an_option_of_another_program(gpt: Any, typed: str, hint: str) -> None:
    done = gpt(*shlex.split(typed))
    assert done.code == 2 and done.err_lines[-1] == f"hint: {hint}"
    words = shlex.split(hint.removeprefix("use "))
    if words[0].startswith("-") and "VALUE" not in hint:
        again = gpt(typed.split()[0], *words, "--no-such-option")
        assert again.err_lines[0].startswith("error: No such option: --no-such-option"), again.err


def test_what_is_typed_behind_a_known_option_is_no_option(gpt: Any) -> None:
    assert "see `gpt train --help`" in gpt("train", "-z").err
    assert "use " not in gpt("generate", "--checkpoint", "none", "--", "-start").err


@pytest.mark.parametrize("word", KEYS)
def test_every_old_word_has_a_key(word: str) -> None:
    known = keys()
    assert word not in {key.rpartition(".")[2] for key in known}, "it is a name of ours"
    for key in KEYS[word]:
        assert key in known
        section, _, _ = key.rpartition(".")
        if section:
            hint = suggestion((section, word))
            assert hint.startswith(f"did you mean '{key}'?")
            assert (note_for(word) or "") in hint
    assert f"'{KEYS[word][0]}'" in suggestion((word,))


def test_the_words_of_other_programs_for_options_are_those_of_options_of_ours() -> None:
    from gptcli.cli import _command

    commands = _command().commands.values()
    options = {name for command in commands for param in command.params for name in param.opts}
    assert set(OPTIONS) <= options


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.emb_dim", "model.n_embd"),
        ("max_length", "model.block_size"),
        ("data.max_length", "data.seq_len"),
        ("generate.max_length", "generate.max_new_tokens"),
        ("train_ratio", "data.val_fraction"),
        ("eta_min", "optim.min_lr"),
        ("context_size", "model.block_size"),
        ("vocab_file", "tokenizer.path"),
        ("data.block_size", "model.block_size"),
        ("train.Batch-Size", "train.micro_batch_size"),
        ("model.n_haed", "model.n_head"),
    ],
)
def test_an_old_word_wins_over_the_nearest_spelling(key: str, meant: str) -> None:
    with pytest.raises(Exception, match=f"did you mean '{meant}'"):
        load_config(None, [f"{key}=1"])
