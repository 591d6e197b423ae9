"""Run folders: held by one trainer, never trained over, set aside whole."""

from pathlib import Path

import pytest

from gptcli.checkpoint import load_checkpoint
from gptcli.errors import ConfigError, RunLockedError
from gptcli.runs import folder as module
from gptcli.runs.folder import open_run
from support.runs import Tiny, finish, stop_after


def test_a_folder_with_a_run_is_not_trained_over(tiny: Tiny) -> None:
    finish(tiny())
    before = (tiny().run_folder / "last.pt").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        finish(tiny())
    assert caught.value.hint is not None and "--resume" in caught.value.hint
    assert (tiny().run_folder / "last.pt").read_bytes() == before


def test_overwriting_sets_the_old_run_aside(tiny: Tiny) -> None:
    finish(tiny())
    old = (tiny().run_folder / "last.pt").read_bytes()
    finish(tiny("seed=5"), overwrite=True)
    finish(tiny("seed=6"), overwrite=True)
    assert Path("runs/tiny~1/last.pt").read_bytes() == old
    assert Path("runs/tiny~2/last.pt").exists()
    assert load_checkpoint(Path("runs/tiny/last.pt")).config["seed"] == 6


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_no_run_are_left_alone(tiny: Tiny, overwrite: bool) -> None:
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds config\.yaml but no run"):
        finish(tiny(), overwrite=overwrite)
    assert Path("runs/tiny/config.yaml").read_text() == "mine"


def test_a_second_trainer_is_refused(tiny: Tiny) -> None:
    stop_after(tiny(), 2)
    with (
        open_run(tiny(), resume=True, overwrite=False),
        pytest.raises(RunLockedError, match="is training in this folder") as caught,
    ):
        finish(tiny(), resume=True)
    assert caught.value.exit_code == 6


def test_a_run_begun_between_looking_and_locking_is_seen(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    looked = module._refuse_foreign

    def meanwhile(folder: Path) -> None:
        monkeypatch.setattr(module, "_refuse_foreign", looked)
        finish(config)  # another process trains here, and is done
        looked(folder)

    monkeypatch.setattr(module, "_refuse_foreign", meanwhile)
    with (
        pytest.raises(ConfigError, match="already holds a run"),
        open_run(config, resume=False, overwrite=False),
    ):
        pass
