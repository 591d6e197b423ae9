"""Checkpoints: whole, verified, enough on their own, and never a way to run code."""

import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli import atomic
from gptcli.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from gptcli.config import Config, load_config
from gptcli.errors import CheckpointError
from gptcli.runs.find import find_checkpoint
from gptcli.seeding import derive_seed
from gptcli.tokenizers import tokenizer_from

KEYS = ["checksums", "config", "data", "format", "model", "optimizer", "state", "tokenizer",
        "version"]  # fmt: skip


def make() -> Checkpoint:
    """Return a small checkpoint with every kind of value."""
    return Checkpoint(
        model={"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
        optimizer={"a": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3)}},
        config={"seed": 1, "model": {"n_layer": 2, "dropout": 0.1}, "stop": ["x"]},
        tokenizer={"name": "bytes"},
        data={"dir": "data/x", "fingerprint": "f"},
        state={"step": 3, "best_loss": None, "seconds": 1e-9},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make())
    found, made = load_checkpoint(path), make()
    assert found.config == made.config and found.state == made.state
    assert found.tokenizer == made.tokenizer and found.data == made.data
    for name, tensor in made.model.items():
        assert found.model[name].dtype == tensor.dtype
        assert torch.equal(found.model[name], tensor)
    assert torch.equal(found.optimizer["a"]["step"], torch.tensor(3.0))


def test_a_file_has_the_keys_of_the_contract_and_plain_types(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make())
    content = torch.load(path, weights_only=True)
    assert sorted(content) == KEYS

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            for inner in value.values():
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)
        else:
            assert value is None or type(value) in (str, int, float, bool, torch.Tensor)

    check(content)


def test_a_file_replaced_while_it_is_read_is_never_a_mixture(tmp_path: Path) -> None:
    versions, best = [], tmp_path / "best.pt"
    for value in (1.0, 2.0):
        versions.append(tmp_path / f"{value}.pt")
        save_checkpoint(versions[-1], replace(make(), model={"a": torch.full((9,), value)}))
    atomic.link(versions[0], best)
    is_over = threading.Event()

    def train() -> None:
        for path in itertools.cycle(versions):
            if is_over.is_set():
                return
            atomic.link(path, best)

    with ThreadPoolExecutor(1) as saver:
        saver.submit(train)
        try:
            read = [load_checkpoint(best).model["a"] for _ in range(300)]
        finally:
            is_over.set()
    assert {float(weights.unique()) for weights in read} == {1.0, 2.0}


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    path, made = tmp_path / "c.pt", make()
    save_checkpoint(path, made)
    raw = path.read_bytes()
    found = 0
    for index in range(600):
        bit = derive_seed("flip", index) % (8 * len(raw))
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError as error:
            found += 1
            assert str(path) in error.message and error.message.count("\n") == 0
            continue
        assert loaded.config == made.config and loaded.state == made.state
        assert all(torch.equal(loaded.model[name], made.model[name]) for name in made.model)
        assert torch.equal(loaded.optimizer["a"]["exp_avg"], made.optimizer["a"]["exp_avg"])
    assert found > 200


@pytest.mark.parametrize("part", [0, 1, 0.5, -1])
def test_a_truncated_file_is_found(tmp_path: Path, part: float) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw)) if 0 < part < 1 else int(part)])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_only_the_models_part_is_verified_when_only_that_is_used(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make())
    content = torch.load(path, weights_only=True)
    content["optimizer"]["a"]["exp_avg"] += 1
    torch.save(content, path)
    assert load_checkpoint(path, model_only=True).state["step"] == 3
    with pytest.raises(CheckpointError, match="tensor optimizer/a/exp_avg"):
        load_checkpoint(path)
    content["model"]["a"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="tensor model/a"):
        load_checkpoint(path, model_only=True)


class Payload:
    """Runs code when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "c.pt"
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    torch.save({"format": "gptcli-checkpoint", "x": Payload(canary)}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 not really", b"\x80\x04.", b"{}" * 500],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in caught.value.message and caught.value.exit_code == 4


def test_a_checkpoint_of_another_program_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {"w": torch.ones(2)}, "iter_num": 5}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of gptcli"):
        load_checkpoint(path)


def test_a_newer_version_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, make())
    content = torch.load(path, weights_only=True)
    content["version"] = 99
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_checkpoint(tmp_path)


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcli import atomic
    from gptcli.errors import StorageError

    path = tmp_path / "c.pt"
    save_checkpoint(path, make())
    old = path.read_bytes()

    def full(self: Any, data: bytes) -> int:
        import errno

        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error

    monkeypatch.setattr(atomic._Remembering, "write", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        save_checkpoint(path, make())
    assert caught.value.exit_code == 5
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_model_and_tokenizer_come_from_the_file_alone(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "model.pt"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes((run / "best.pt").read_bytes())
    trained = load_model(elsewhere, torch.device("cpu"))
    assert trained.step == 6 and trained.tokenizer.vocab_size == 257
    assert trained.model.lm_head.weight is trained.model.wte.weight
    assert not trained.model.training
    stored = torch.load(elsewhere, weights_only=True)
    assert tokenizer_from(stored["tokenizer"]).fingerprint == trained.tokenizer.fingerprint
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, stored["model"][name])


def test_checkpoints_are_found_by_file_folder_run_and_default(
    tiny: Callable[..., Config], tiny_set: list[str], gpt: Any
) -> None:
    for name in ("one", "two"):
        assert gpt("train", *tiny_set, "-s", f"name={name}").code == 0
    assert find_checkpoint("runs/one/last.pt") == Path("runs/one/last.pt")
    assert find_checkpoint("runs/one") == Path("runs/one/best.pt")
    assert find_checkpoint("one") == Path("runs/one/best.pt")
    assert find_checkpoint(None) == Path("runs/two/best.pt")
    assert find_checkpoint("last.pt") == Path("runs/two/last.pt")
    assert find_checkpoint(None, load_config(None, ["name=one"])) == Path("runs/one/best.pt")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("thre")
    assert caught.value.hint == "runs here: two, one"


def test_without_runs_the_error_says_so() -> None:
    for wanted in (None, "best.pt"):
        with pytest.raises(CheckpointError, match="no run with a checkpoint"):
            find_checkpoint(wanted)
