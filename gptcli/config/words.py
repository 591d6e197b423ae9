"""Other programs' words for our keys and options: nanoGPT, litgpt, transformers, tutorials."""

import re
from collections.abc import Mapping, Sequence

# Our key, and what others call it. A word with several keys means the one in the section at hand,
# else the first.
_WORDS = {
    "run_dir": "out_dir output_dir out output save_dir ckpt_dir log_dir results_dir work_dir",
    "name": "run_name experiment_name exp_name wandb_run_name",
    "seed": "random_seed manual_seed",
    "dtype": "precision mixed_precision ptdtype fp16 bf16",
    "compile": "torch_compile use_compile",
    "data.source": "dataset dataset_name input_file data_file text_file train_file file_path"
    " data_path input_path files",
    "data.dir": "data_dir bin_dir folder",
    "data.config": "dataset_config dataset_config_name subset",
    "data.text_field": "text_column text_key content_field",
    "data.val_fraction": "val_split validation_split val_ratio val_size test_size eval_fraction"
    " train_ratio train_split train_frac train_fraction",
    "tokenizer.name": "tokenizer encoding encoding_name tokenizer_type",
    "tokenizer.path": "vocab_file vocab_path tokenizer_path tokenizer_file",
    "model.n_layer": "n_layers num_layers num_hidden_layers n_blocks num_blocks depth layers",
    "model.n_head": "n_heads num_heads num_attention_heads nhead heads",
    "model.n_kv_head": "num_key_value_heads n_kv_heads num_kv_heads n_query_groups",
    "model.n_embd": "emb_dim embedding_dim embed_dim embedding_size embed_size n_embed hidden_size"
    " hidden_dim d_model width",
    "model.n_inner": "intermediate_size d_ff ffn_dim mlp_dim dim_feedforward",
    "model.block_size": "context_length context_size context_window n_ctx n_positions"
    " max_position_embeddings max_seq_len max_seq_length max_sequence_length max_length max_len"
    " seq_length sequence_length window_size",
    "data.seq_len": "max_length max_len max_seq_len max_seq_length seq_length sequence_length",
    "model.vocab_size": "padded_vocab_size n_vocab",
    "model.dropout": "drop_rate dropout_rate dropout_prob resid_pdrop embd_pdrop attn_pdrop",
    "model.norm_eps": "layer_norm_epsilon layer_norm_eps rms_norm_eps",
    "model.position": "pos_embedding position_embedding positional_encoding",
    "model.rope_theta": "rope_base rotary_base",
    "model.mlp": "activation activation_function hidden_act",
    "model.tie_embeddings": "weight_tying tie_weights tie_word_embeddings",
    "model.qkv_bias": "attention_bias",
    "model.init_from": "pretrained pretrained_model model_name model_name_or_path choose_model",
    "train.max_steps": "max_iters n_iter n_iters num_iters iters iterations num_iterations n_steps"
    " num_steps total_steps train_steps lr_decay_iters",
    "train.max_epochs": "epochs epoch n_epochs num_epochs num_train_epochs",
    "train.max_minutes": "minutes max_time time_limit time_budget",
    "train.micro_batch_size": "batch_size bs device_batch_size per_device_train_batch_size"
    " train_batch_size mini_batch_size",
    "train.tokens_per_step": "gradient_accumulation_steps grad_accum_steps accumulation_steps"
    " global_batch_size total_batch_size tokens_per_batch",
    "train.eval_every": "eval_interval eval_freq eval_steps val_interval",
    "train.eval_tokens": "eval_iters eval_iter eval_batches",
    "train.save_every": "save_interval save_steps save_freq checkpoint_interval"
    " always_save_checkpoint",
    "train.log_every": "log_interval log_freq logging_steps print_every",
    "train.sample_every": "sample_interval generate_every",
    "train.keep_last": "save_total_limit",
    "train.loggers": "wandb wandb_log use_wandb wandb_project report_to logger",
    "train.activation_checkpointing": "gradient_checkpointing",
    "optim.lr": "learning_rate max_lr max_learning_rate peak_lr base_lr",
    "optim.min_lr": "eta_min min_learning_rate lr_min final_lr",
    "optim.schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule decay_lr",
    "optim.warmup_steps": "warmup warmup_iters n_warmup_steps num_warmup_steps lr_warmup_steps"
    " warmup_ratio",
    "optim.grad_clip": "max_grad_norm grad_clip_norm gradient_clip_val clip_grad clip_grad_norm"
    " max_norm",
    "optim.weight_decay": "wd",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "generate.prompt": "start start_context input input_text",
    "generate.max_new_tokens": "max_tokens max_length max_gen_len n_predict length",
    "generate.num_samples": "num_return_sequences n_samples",
    "generate.temperature": "temp",
    "generate.stop": "stop_sequences",
}  # fmt: skip
# The same for options, by those of our commands.
OPTIONS = {
    "--checkpoint": "ckpt ckpt_path checkpoint_path model_path model weights out_dir load_from",
    "--resume": "resume_from_checkpoint resume_from auto_resume",
    "--gpus": "num_gpus n_gpus ngpus devices nproc nproc_per_node",
    "--out": "output output_dir output_path out_dir",
    "--workers": "num_workers num_proc n_jobs",
    "--data": "data_dir dataset",
    "--text": "input input_file text_file file",
    "--to": "format export_format output_format file_format",
    "--max-tokens": "max_eval_tokens",
}
# How to convert the value where the unit differs.
_CONVERTED = {
    "train_ratio train_split train_frac train_fraction": "the rest of it: 0.1 for 0.9",
    "eval_iters eval_iter eval_batches": "in tokens: {} * batch_size * block_size",
    "gradient_accumulation_steps grad_accum_steps accumulation_steps":
        "in tokens: {} * batch_size * block_size",
    "global_batch_size total_batch_size": "in tokens: rows * block_size",
    "warmup_ratio": "in steps: {} * max_steps",
    "always_save_checkpoint": "each evaluation saves already",
    "wandb wandb_project wandb_log use_wandb report_to logger":
        "a list: [wandb]; the project is in the variable WANDB_PROJECT",
    "fp16": "float16",
    "bf16": "bfloat16",
    "decay_lr": "constant where it is false",
    "attention_bias": "without that of the projection after attention",
}  # fmt: skip
# Where a key of several sections is looked for, the likeliest first.
_SECTIONS = {
    "prepare": ("data", "tokenizer"),
    "train": ("train", "model", "optim"),
    "eval": ("train",),
    "generate": ("generate",),
}
NEEDLESS = {
    "shuffle": "training windows are always drawn in a random order",
    "drop_last": "there is no incomplete batch",
    "num_workers": "batches are read ahead without it",
    "pin_memory": "batches are pinned where that helps",
}
KEYS: dict[str, list[str]] = {}
for _key, _words in _WORDS.items():
    for _word in _words.split():
        KEYS.setdefault(_word, []).append(_key)
_NOTES = {word: note for words, note in _CONVERTED.items() for word in words.split()}


def plain(word: str) -> str:
    """Return a word as the tables have it: lower case, with underscores."""
    return word.strip("-").lower().replace("-", "_")


def key_for(word: str, section: str = "") -> str | None:
    """Return the key that another program calls `word`, preferring one in `section`."""
    return _first(KEYS.get(plain(word), []), [section])


def note_for(word: str) -> str:
    """Return how the value of `word` becomes our key's; nothing if it is the same."""
    word = plain(word)
    return _NOTES.get(word, "").format(word)


def option_for(words: Sequence[str], command: str, known: Mapping[str, bool]) -> str | None:
    """Return what to write in place of the first word that is another program's option.

    `known` says of the options of `command` whether each is a flag.
    """
    for number, typed in enumerate(words):
        name, _, value = typed.partition("=")
        if typed == "--":
            return None
        if name not in known and re.fullmatch(r"--?[A-Za-z][\w-]+", name):
            following = words[number + 1] if number + 1 < len(words) else ""
            value = value or following * (following[:1] != "-")
            return _instead(plain(name), value, command, known)
    return None


def _instead(word: str, value: str, command: str, known: Mapping[str, bool]) -> str | None:
    from gptcli.config.reference import keys

    options = [option for option, others in OPTIONS.items() if word in others.split()]
    if word in NEEDLESS and "--workers" not in known:
        return f"leave it out: {NEEDLESS[word]}"
    same = [key for key in keys() if key.rpartition(".")[2] == word]
    key = word if word in keys() else _first(KEYS.get(word, same), _SECTIONS.get(command, ()))
    ours = (word, *options, (key or "").rpartition(".")[2])
    if (word, value) == ("init_from", "resume"):
        ours = ("resume",)
    note = note_for(word)
    value = "VALUE" if note or not value else value
    for option in (f"--{name.strip('-').replace('_', '-')}" for name in ours):
        if option in known:
            return f"use {option}{'' if known[option] else f' {value}'}" + f" ({note})" * bool(note)
    if key is None or "--set" not in known:
        return None
    return f"use -s {key}={value}" + f" ({note})" * bool(note)


def _first(found: Sequence[str], sections: Sequence[str]) -> str | None:
    """Return the first key in the first section that has one, else the first of all."""
    ordered = [key for section in sections for key in found if key.startswith(f"{section}.")]
    return next(iter([*ordered, *found]), None)
