"""Ranks under datatrove's executors: the shipped example, as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.folders import content

EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster" / "prepare_datatrove.py"
N_FILES = 7
MARKS = Path("data/shared.logs/ranks/completions")
Example = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="datatrove forks")

# Runs a job at once, each index of its array after the other; dependencies are met by then.
SBATCH = r"""#!/usr/bin/env bash
echo "$*" >> sbatch.log
script=${!#}
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
for index in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$index SLURM_JOB_ID=7 SLURM_NODELIST=here bash "$script" >> jobs.log 2>&1
done
echo Submitted batch job 7
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; "$@"\n'
SCONTROL = "#!/usr/bin/env bash\necho here\n"


@pytest.fixture
def run_yaml() -> Path:
    """A run.yaml whose source is a folder of files of different lengths, each a unit."""
    folder = Path("texts")
    folder.mkdir()
    for index in range(N_FILES):
        lines = [json.dumps({"text": f"line {i} of {index} " * (1 + i % 5)}) for i in range(60)]
        (folder / f"part-{index}.jsonl").write_text("\n".join(lines[: 20 + 5 * index]) + "\n")
    path = Path("run.yaml")
    path.write_text(
        "data: {source: texts, dir: data/shared, val_fraction: 0.2}\n"
        "tokenizer: {name: bpe, vocab_size: 280}\n"
    )
    return path


@pytest.fixture
def example(run_yaml: Path) -> Example:
    """Return a function that runs the example, with some of its text replaced."""

    def run(*replacements: tuple[str, str], ok: bool = True) -> subprocess.CompletedProcess[str]:
        text = EXAMPLE.read_text()
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        Path("prepare.py").write_text(text)
        programs = f"{Path('bin').resolve()}{os.pathsep}{Path(sys.executable).parent}"
        done = subprocess.run(
            [sys.executable, "prepare.py"], capture_output=True, text=True, timeout=100,
            env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        assert (done.returncode == 0) == ok, done.stderr
        return done

    return run


def times(folder: Path, pattern: str = "*") -> dict[str, int]:
    """Return when each file of a folder was last written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


@pytest.fixture
def whole(gpt: Callable[..., object], run_yaml: Path) -> dict[str, bytes]:
    """What one process makes of run.yaml."""
    gpt("prepare", "-c", str(run_yaml), "--out", "data/whole")
    return content(Path("data/whole"))


def test_four_ranks_give_the_bytes_of_one_process(
    example: Example, whole: dict[str, bytes]
) -> None:
    example()
    assert "manifest.json" in whole and len(whole) > N_FILES
    assert content(Path("data/shared")) == whole
    assert sorted(times(MARKS)) == ["00000", "00001", "00002", "00003"]
    stats = json.loads(Path("data/shared.logs/ranks/stats.json").read_text())[0]["stats"]
    manifest = json.loads(Path("data/shared/manifest.json").read_text())
    assert stats["units"]["total"] == N_FILES
    assert stats["tokens"]["total"] == sum(manifest["tokens"].values())


def test_ranks_may_have_workers_of_their_own(example: Example, whole: dict[str, bytes]) -> None:
    example(("PrepareShare(plan)", "PrepareShare(plan, workers=2)"))
    assert content(Path("data/shared")) == whole


def test_only_a_rank_whose_mark_is_gone_is_run_again(
    example: Example, whole: dict[str, bytes]
) -> None:
    unfinished = ("        finalize(plan)", "        pass")
    example(unfinished)
    shards, marks = times(Path("data/shared"), "*.bin"), times(MARKS)
    logs = times(Path("data/shared.logs/ranks/logs"))
    (MARKS / "00001").unlink()
    Path("data/shared/train_000005_000.bin").unlink()  # of units 1 and 5, which are rank 1's
    example(unfinished)
    changed = {name for name, at in times(MARKS).items() if at != marks[name]}
    assert changed == {"00001"}
    logs_now = times(Path("data/shared.logs/ranks/logs"))
    assert {name for name in logs if logs_now[name] != logs[name]} == {"task_00001.log"}
    shards_now = times(Path("data/shared"), "*.bin")
    assert shards_now.keys() == shards.keys()
    rewritten = {name for name in shards if shards_now[name] != shards[name]}
    assert rewritten == {"train_000005_000.bin", "val_000005_000.bin"}
    example()
    assert content(Path("data/shared")) == whole


def test_a_rank_that_fails_is_named_and_run_again_when_it_is_mended(
    example: Example, whole: dict[str, bytes]
) -> None:
    bad = Path("texts/part-2.jsonl")
    good = bad.read_bytes()
    learned = ("tokenizer: {name: bpe, vocab_size: 280}", "tokenizer: {path: data/whole}")
    config = Path("run.yaml").read_text()
    Path("run.yaml").write_text(config.replace(*learned))  # a tokenizer that need not read it
    bad.write_bytes(b'{"text": "cut off\n')
    failed = example(ok=False)
    assert "part-2.jsonl" in failed.stderr.splitlines()[-1]
    assert "00002" not in times(MARKS)
    assert not Path("data/shared/manifest.json").exists()
    bad.write_bytes(good)
    example()
    assert sorted(times(MARKS)) == ["00000", "00001", "00002", "00003"]
    shards = {name: sha for name, sha in whole.items() if name.endswith(".bin")}
    assert shards.items() <= content(Path("data/shared")).items()


def test_marks_of_other_data_are_not_believed(example: Example, whole: dict[str, bytes]) -> None:
    example()
    Path("run.yaml").write_text(Path("run.yaml").read_text() + "seed: 5\n")
    failed = example(ok=False)
    assert "differs in: seed" in failed.stderr.splitlines()[-1]
    assert content(Path("data/shared")) == whole


def test_the_same_on_slurm(example: Example, whole: dict[str, bytes]) -> None:
    Path("bin").mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (Path("bin") / name).write_text(script)
        (Path("bin") / name).chmod(0o755)
    example(("EXECUTOR = local", "EXECUTOR = slurm"), ("tasks=64", "tasks=3"))
    jobs = Path("jobs.log").read_text()
    assert content(Path("data/shared")) == whole, jobs
    assert sorted(times(MARKS)) == ["00000", "00001", "00002"]
    submitted = Path("sbatch.log").read_text().splitlines()
    assert any("--dependency=afterok:7" in line for line in submitted)
