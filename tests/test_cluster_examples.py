"""examples/cluster: the recipes run, with programs in the place of Slurm's and of torchrun."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser

from gptcli import cli, errors
from gptcli.config import load_config
from support.processes import until

FOLDER = Path(__file__).parent.parent / "examples" / "cluster"
RECIPES = [path for path in sorted(FOLDER.iterdir()) if path.suffix != ".md" and path.is_file()]
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
STATUS = Path("runs/run/status.json")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the recipes are for bash")

SCONTROL = """#!/usr/bin/env bash
echo "$*" >> scontrol.log
[[ $1 != show ]] || printf 'node1\\nnode2\\n'
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --*=* ]]; do shift; done\nexec "$@"\n'
# Ends as torchrun does, with 1 for any reason; the run's own code goes into status.json.
TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > torchrun.args
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > shutdown_timeout
run_code=$RUN_CODE
if [[ $RUN_CODE == asleep ]]; then
  trap 'sleep 0.5; run_code=75; kill %1' TERM
  sleep 60 &
  echo $$ > torchrun.pid
  wait
fi
if [[ $run_code != unborn ]]; then
  mkdir -p runs/run
  echo "{\\"pid\\": $$, \\"exit_code\\": $run_code}" > runs/run/status.json
fi
[[ $run_code == 0 ]] || exit 1
"""


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the programs that stand in for others on the PATH."""
    folder = Path("bin").resolve()
    folder.mkdir()
    for name, script in (("scontrol", SCONTROL), ("srun", SRUN), ("torchrun", TORCHRUN)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the Service and the Job."""
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return service, job


def container() -> dict[str, Any]:
    """Return the container of the Job's pods."""
    [found] = documents()[1]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def command(recipe: str) -> list[str]:
    """Return the command line that a recipe's scheduler starts."""
    if recipe == "slurm":
        return ["bash", str(FOLDER / "slurm.sbatch")]
    return [*container()["command"], *container()["args"]]


def environment(recipe: str, run_code: str) -> dict[str, str]:
    """Return what the scheduler sets, and how the run is going to end."""
    if recipe == "slurm":
        own = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    else:
        own = {"JOB_COMPLETION_INDEX": "1", "POD_IP": "10.0.0.7"}
        own |= {item["name"]: item["value"] for item in container()["env"] if "value" in item}
    return {**os.environ, **own, "RUN_CODE": run_code}


def start(recipe: str, run_code: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe for training to its end."""
    return subprocess.run(
        command(recipe), env=environment(recipe, run_code), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def requeued() -> list[str]:
    """Return the jobs that Slurm was asked to queue again."""
    lines = Path("scontrol.log").read_text().splitlines()
    return [line.removeprefix("requeue ") for line in lines if line.startswith("requeue ")]


def require_command_of_ours(words: list[str]) -> None:
    """Refuse a command line that `gpt` would not understand."""
    name, *options = words
    group: Any = cli._command()
    with group.commands[name].make_context(name, options) as parsed:
        load_config(None, parsed.params["set_"] or [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_each_recipe_has_two_lines_to_change(path: Path) -> None:
    assert re.findall(r"# CHANGE \((\d of \d)\): \w", path.read_text()) == ["1 of 2", "2 of 2"]
    assert path.name in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)
    first_command = re.search(r"^(?!#|$)", path.read_text(), re.MULTILINE)
    assert first_command and "#SBATCH" not in path.read_text()[first_command.start() :]


def test_slurm_signals_and_requeues() -> None:
    text = (FOLDER / "slurm.sbatch").read_text()
    lines = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
    options = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line))
    assert {"--requeue", "--exclusive"} <= options.keys()
    assert options["--ntasks-per-node"] == "1" and options["--open-mode"] == "append"
    name, _, seconds = options["--signal"].partition("@")
    assert name == "USR1"  # to the steps: with B: it would end the script, which has no trap
    [limit] = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)
    assert int(seconds) > int(limit) > 30  # what torchrun takes by itself


def test_kubernetes_fields_agree() -> None:
    service, job = documents()
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert f"--nnodes={spec['completions']} " in container()["args"][0]
    assert pod["restartPolicy"] == "Never"  # which a policy of failures asks for
    assert {mount["name"] for mount in container()["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    limit = int(environment("kubernetes", "0")["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > limit > 30


def test_kubernetes_tries_again_what_that_can_mend() -> None:
    action = {}
    for rule in documents()[1]["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container()["name"]
            assert rule["onExitCodes"]["values"] == sorted(rule["onExitCodes"]["values"])
            action |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
        else:
            assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert action.pop(errors.EXIT_PREEMPTED) == "Ignore"
    passing = (errors.RunLockedError, errors.DistributedError)
    lasting = {kind.exit_code for kind in errors.GptError.__subclasses__() if kind not in passing}
    assert action == dict.fromkeys({*lasting, errors.EXIT_BUG}, "FailJob")


@pytest.mark.parametrize("recipe", ["slurm", "kubernetes"])
def test_torchrun_and_gpt_understand_their_options(recipe: str, programs: None) -> None:
    assert start(recipe, "0").returncode == 0
    words = Path("torchrun.args").read_text().splitlines()
    parsed = get_args_parser().parse_args(words)
    assert parsed.module and parsed.training_script == "gptcli"
    require_command_of_ours(parsed.training_script_args)
    assert "--resume" in parsed.training_script_args
    assert {"SIGTERM", "SIGUSR1"} <= set(parsed.signals_to_handle.split(","))
    assert parsed.nproc_per_node == "gpu"
    parsed.nproc_per_node = "1"  # there may be no GPU here
    config, _, _ = config_from_args(parsed)
    assert (config.min_nodes, config.max_nodes, config.max_restarts) == (2, 2, 3)
    assert config.rdzv_backend == "c10d"
    host = "node1" if recipe == "slurm" else "gpt-train-0.gpt-train"
    assert re.fullmatch(rf"{host}:2\d{{4}}", config.rdzv_endpoint)
    if recipe == "kubernetes":
        assert config.rdzv_configs["is_host"] == "0" and config.local_addr == "10.0.0.7"
    assert int(Path("shutdown_timeout").read_text()) == 150


@pytest.mark.parametrize("recipe", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    ("run_code", "code"),
    [("0", 0), ("75", 75), ("7", 7), ("null", 1), ("unborn", 1)],
    ids=["finished", "preempted", "failed", "killed", "not started"],
)
def test_a_job_ends_with_the_code_of_its_run(
    recipe: str, run_code: str, code: int, programs: None
) -> None:
    STATUS.parent.mkdir(parents=True)  # an earlier part of this run, which was preempted
    STATUS.write_text('{"pid": 0, "exit_code": 75}')
    done = start(recipe, run_code)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""
    if recipe == "slurm":
        assert requeued() == (["123456"] if run_code == "75" else [])


@pytest.mark.parametrize("recipe", ["slurm", "kubernetes"])
def test_a_job_that_is_ended_from_outside(recipe: str, programs: None) -> None:
    process = subprocess.Popen(command(recipe), env=environment(recipe, "asleep"))
    until(lambda: Path("torchrun.pid").exists() and Path("torchrun.pid").read_text())
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=50)
    if recipe == "slurm":  # scancel, which signals torchrun too: not to be requeued
        os.kill(int(Path("torchrun.pid").read_text()), signal.SIGTERM)
        assert (code, requeued()) == (-signal.SIGTERM, [])
    else:  # an eviction: torchrun is told, saves, and is waited for
        assert code == 75
        assert json.loads(STATUS.read_text())["exit_code"] == 75


def test_prepare_in_an_array_of_jobs(gpt: Callable[..., Any]) -> None:
    Path("texts").mkdir()
    for index in range(5):
        lines = [json.dumps({"text": f"line {i} of {index}"}) for i in range(20 + index)]
        Path(f"texts/part-{index}.jsonl").write_text("\n".join(lines) + "\n")
    Path("run.yaml").write_text(
        "data: {source: texts, dir: data/shared, val_fraction: 0.2}\ntokenizer: {name: bytes}\n"
    )
    Path("bin").mkdir()
    Path("bin/gpt").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m gptcli "$@"\n')
    Path("bin/gpt").chmod(0o755)
    path = f"{Path('bin').resolve()}{os.pathsep}{os.environ['PATH']}"
    for index in (1, 0, 2):
        own = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "3"}
        env = {**os.environ, **own, "SLURM_CPUS_PER_TASK": "1", "PATH": path}
        subprocess.run(["bash", str(FOLDER / "prepare.sbatch")], env=env, check=True)
    assert not Path("data/shared/manifest.json").exists()
    finalize = ["bash", str(FOLDER / "prepare.sbatch"), "--finalize"]
    subprocess.run(finalize, env={**os.environ, "PATH": path}, check=True)
    assert gpt("prepare", "-c", "run.yaml", "--out", "data/whole").code == 0
    shared, whole = (
        {file.name: hashlib.sha256(file.read_bytes()).digest() for file in Path(name).iterdir()}
        for name in ("data/shared", "data/whole")
    )
    assert shared == whole and "manifest.json" in whole


def test_commands_of_the_readme_exist() -> None:
    lines = re.findall(r"^gpt .+$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        require_command_of_ours(shlex.split(line)[1:])
