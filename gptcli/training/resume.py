"""Resuming a run: from which checkpoint, and what may have changed since.

A change that a resumed run may not make is refused here, any other becomes a note.
"""

import math
from collections.abc import Mapping
from typing import Any

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.config.schema import Config
from gptcli.config.windows import changes
from gptcli.errors import CheckpointError, ConfigError
from gptcli.runs.folder import Run
from gptcli.runs.read import flatten
from gptcli.tokenizers import tokenizer_from
from gptcli.training.optim import lr_at
from gptcli.training.spec import RunSpec, max_steps_of

_FIXED_KEYS = ("seed", "data.seq_len", "data.stride", "train.tokens_per_step")


def newest_checkpoint(run: Run, notes: list[str]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, noting each that does not."""
    files = run.step_files()
    for index, path in enumerate(files):
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            notes.append(f"skipped {error.message}")
            continue
        run.set_aside(files[:index])
        return checkpoint
    if files:
        raise CheckpointError(
            f"{run.checkpoints}: none of its {len(files)} checkpoints can be used;"
            f" {notes[-1].removeprefix('skipped ')}",
            "start over with --overwrite, which renames these files",
        )
    return None


def compare_settings(checkpoint: Checkpoint, spec: RunSpec) -> list[str]:
    """Return the changed settings of a resumed run as notes; refuse those it must keep.

    Raises:
        ConfigError: With every key that may not change.
    """
    config = spec.config
    # A checkpoint older than a key was made with what is now its default.
    new = flatten(config.model_dump(mode="json"))
    old = flatten(Config().model_dump(mode="json")) | flatten(checkpoint.config)
    moved = {"run_dir"}  # a run may be
    changed = [key for key in old | new if old.get(key) != new.get(key) and key not in moved]
    steps = "train.tokens_per_step"
    refused = [
        f"{key} ({old.get(key)} there, {new.get(key)} here)"
        for key in changed
        if key in _FIXED_KEYS or key.startswith("model.")
    ]
    if tokenizer_from(checkpoint.tokenizer).fingerprint != spec.tokenizer.fingerprint:
        refused.append("tokenizer")
    if checkpoint.data["fingerprint"] != spec.manifest.fingerprint:
        before = checkpoint.data.get("parts") or {"": checkpoint.data}
        known = {facts["fingerprint"] for facts in before.values()}
        other = [str(part.folder) for part in spec.parts if part.manifest.fingerprint not in known]
        where = " and ".join(other) or "another order"
        refused.append(f"data (the tokens in {where} are not those of the run)")
    refused += _changed_mix(checkpoint, spec)
    if refused:
        raise ConfigError(
            f"{config.run_folder}: a resumed run keeps its model, tokenizer, data, seed, seq_len,"
            f" stride and tokens_per_step; changed: {', '.join(refused)}",
            f"to resume with other micro-batches, keep the steps: -s {steps}={old[steps]}"
            if [key for key in changed if key in _FIXED_KEYS] == [steps] and len(refused) == 1
            else "undo the change, or train a new run with another -s name=...",
        )
    return [f"{key} changed from {old.get(key)} to {new.get(key)}" for key in changed]


def _changed_mix(checkpoint: Checkpoint, spec: RunSpec) -> list[str]:
    """Return what would let a mixture draw other windows from here on than it was to."""
    old = Config.model_validate(checkpoint.config)
    before, now = old.data.mix, spec.config.data.mix
    if [each.weight for each in before or []] != [each.weight for each in now or []]:
        return ["data.mix (other weights)"]
    steps = max_steps_of(old, spec.part_windows) if changes(now) else spec.max_steps
    if steps != spec.max_steps:
        return [f"train.max_steps ({steps} there, {spec.max_steps} here), over which the weights"
                " of data.mix change"]  # fmt: skip
    return []


def rate_change(checkpoint: Checkpoint, spec: RunSpec, step: int) -> list[str]:
    """Name a jump of the learning rate where a run resumes: it is a function of all the steps."""
    old, steps = Config.model_validate(checkpoint.config), spec.max_steps
    before = lr_at(step, max_steps_of(old, spec.part_windows), old)
    after = lr_at(step, steps, spec.config)
    if step >= steps or math.isclose(before, after, rel_tol=0.01):
        return []
    return [
        f"the learning rate changes from {before:.2e} to {after:.2e} at step {step}:"
        f" optim.schedule={spec.config.optim.schedule} now covers {steps:,} steps"
    ]


def machine_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name what keeps a resumed run from being bit for bit the one that was not stopped."""
    changed = [f"{key} ({old[key]} then, {new[key]} now)" for key in new
               if key in old and old[key] != new[key]]  # fmt: skip
    if not changed:
        return []
    return [f"resume is no longer bit-exact: this machine differs in {', '.join(changed)}"]
