"""README and docs: what they show is executed or parsed, and what they point to is there."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from gptcli import errors
from gptcli.config import load_config
from gptcli.config.loader import example_files
from gptcli.config.reference import keys
from support.commands import Gpt, Result, require_understood
from support.processes import COMMAND_OF_A_COPY

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / ".github" / "CONTRIBUTING.md",
         *sorted(DOCS.glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]  # fmt: skip
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TINY = (
    "model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=16",
    "train.max_steps=4", "train.eval_every=2", "train.sample_every=2", "train.log_every=1",
    "tokenizer.vocab_size=300", "generate.max_new_tokens=4", "device=cpu", "compile=false",
)  # fmt: skip
CODES = {
    "": {0, errors.EXIT_DIFFERS, errors.EXIT_BUG, errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED},
    **{f"`{kind.__name__}`": {kind.exit_code} for kind in errors.GptError.__subclasses__()},
}


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of the languages."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [body for language, body in found if language in languages]


def commands(page: Path, program: str = "gpt") -> Iterator[list[str]]:
    """Yield the words behind a program's name, for each line of a page's blocks that runs it."""
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if f"{program} " not in line or line.startswith(("error:", "hint:")):
                continue
            for part in re.split(r" (?:&&|\|) ", line):
                words = shlex.split(part, comments=True)
                if words and Path(words[0]).name == program:
                    yield words[1:]


def has_section(page: Path, name: str) -> bool:
    """Tell whether a heading of the page has this name in a link."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return name in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        name, _, section = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not section or has_section(file, section), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_are_understood(page: Path) -> None:
    for words in commands(page):
        if "..." not in words:
            require_understood(words)
    for words in commands(page, "torchrun"):
        parsed = get_args_parser().parse_args(words)
        assert parsed.module and parsed.training_script == "gptcli"
        require_understood(parsed.training_script_args)


@pytest.mark.parametrize("page", [*PAGES, *example_files()], ids=lambda page: page.name)
def test_commands_and_keys_in_sentences_are_understood(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`([^`]+)`", text):
        if code.startswith("gpt ") and "..." not in code and "|" not in code and "[" not in code:
            for part in " ".join(code.replace("\n#", " ").split()).split(" && "):
                require_understood(shlex.split(re.sub(r"\b[A-Z]\b", "1", part))[1:])
    for key in re.findall(r"(?<![\w-])-s '?([\w.]+)=", text):
        assert key in keys() or key == "KEY", key


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert len(list(commands(DOCS / "tutorial.md"))) > 12
    assert len(list(commands(DOCS / "how-to.md"))) > 10
    assert len(list(commands(DOCS / "how-to.md", "torchrun"))) == 1
    for wrong in ("trane", "train --gpu 2", "train -s model.n_heads=2", "data pek data/x"):
        with pytest.raises(Exception, match=r"(?i)no such|unknown"):
            require_understood(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_configurations_load(page: Path) -> None:
    for index, block in enumerate(blocks(page, "yaml")):
        path = Path(f"{index}.yaml")
        path.write_text(block, encoding="utf-8")
        config = load_config(str(path))
        for section, values in yaml.safe_load(block).items():
            assert isinstance(values, dict), section
            assert all(config.is_set(f"{section}.{key}") for key in values)


def test_the_tutorial_runs_as_it_stands(corpus: Path, gpt: Callable[..., Any]) -> None:
    corpus.rename("book.txt")
    shutil.copy("book.txt", "other.txt")
    [block] = blocks(DOCS / "tutorial.md", "yaml")
    assert block.startswith("# run.yaml\n")
    Path("run.yaml").write_text(block, encoding="utf-8")
    [rows] = blocks(DOCS / "tutorial.md", "json")
    Path("chat.jsonl").write_text(rows * 20, encoding="utf-8")
    tiny = [part for word in (*TINY, "model.block_size=64") for part in ("-s", word)]
    for words in commands(DOCS / "tutorial.md"):
        done = gpt(*words, *(tiny if "run.yaml" in words else []))
        assert done.code == 0, (words, done.err)
    assert Path("my-model/model.safetensors").exists() and Path("my-model.gguf").exists()
    assert Path("loss.png").exists() and Path("runs/run/report.html").exists()


def test_the_python_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(DOCS / "python.md", "python")):
        exec(compile(block, f"python.md, block {number + 1}", "exec"), names)
    said = capsys.readouterr().out
    assert "did you mean 'model.n_head'? | exit code 2" in said
    assert names["losses"][-1] < names["losses"][0] and names["summary"].step == 80


def test_the_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) ?\|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)
    assert [int(code) for code, _ in rows] == sorted({code for of in CODES.values() for code in of})
    assert all(int(code) in CODES[name] for code, name in rows)
    told = [name for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert {vars(errors)[name] for name in told} <= {int(code) for code, _ in rows}


def test_the_layers_are_those_of_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = blocks(DOCS / "design.md", "text")[0]
    shown = [line.split("  ")[0] for line in layers.splitlines() if not line.startswith("  ")]
    assert shown == contract["contracts"][0]["layers"]


def path_of_a_token() -> dict[str, str]:
    """Return the files of the design's path of a token, each with its description."""
    rows = blocks(DOCS / "design.md", "text")[1].splitlines()
    return dict(row[8:].split(maxsplit=1) for row in rows)


def test_the_path_of_a_token_is_told_in_the_words_of_its_files() -> None:
    for name, words in path_of_a_token().items():
        path = ROOT / "gptcli" / name
        source = (path / "__init__.py" if path.is_dir() else path).read_text(encoding="utf-8")
        assert source.startswith(f'"""{words}'), name


def test_a_token_passes_the_files_of_its_path(corpus: Path, gpt: Callable[..., Any]) -> None:
    called: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function, not an imported module
            called.add(frame.f_code.co_filename)

    tiny = [part for word in ("tokenizer.name=bpe", *TINY) for part in ("-s", word)]
    train = ["train", "-s", f"data.source={corpus}", *tiny]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        for words in (["prepare", str(corpus), *tiny], train, ["generate", "the"]):
            done = gpt(*words)
            assert done.code == 0, done.err
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    for name in path_of_a_token():
        place = str(ROOT / "gptcli" / name)
        assert any(file.startswith(place) for file in called), f"{name} is not on the path"


def test_modules_that_write_to_the_terminal_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [title] = [c["name"] for c in contracts["contracts"] if "write to the terminal" in c["name"]]
    page = " ".join((DOCS / "design.md").read_text(encoding="utf-8").replace("`", "").split())
    assert title in page.replace("Only", "only")


def test_the_files_that_the_design_names_are_there() -> None:
    for name in re.findall(
        r"\b[a-z]+(?:/[a-z_]+)+\.py|`[a-z_]+\.py`", (DOCS / "design.md").read_text()
    ):
        place = name.strip("`")
        assert any((root / place).exists() for root in (ROOT, ROOT / "gptcli")), name


def apply_recipes(page: Path, scratch: Path) -> None:
    """Do to a copy of the code what the blocks of a page say."""
    for block in blocks(page, "python"):
        path = scratch / block.splitlines()[0].removeprefix("# ")
        path.write_text(block.partition("\n")[2], encoding="utf-8")
    for block in blocks(page, "diff"):
        first, *lines = block.splitlines()
        path = scratch / first.removeprefix("--- ")
        before = "\n".join(line[1:] for line in lines if line[:1] in (" ", "-"))
        after = "\n".join(line[1:] for line in lines if line[:1] in (" ", "+"))
        source = path.read_text(encoding="utf-8")
        assert source.count(before + "\n") == 1, f"{path}: {before}"
        path.write_text(source.replace(before + "\n", after + "\n"), encoding="utf-8")


@pytest.fixture
def extended(tmp_path: Path, fork_server: Gpt) -> Gpt:
    """Run a command line of a copy of the code to which every recipe was applied."""
    scratch = tmp_path / "scratch"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gptcli", scratch / "gptcli", ignore=ignored)
    apply_recipes(DOCS / "extend.md", scratch)
    shutil.copy(ROOT / "pyproject.toml", scratch)
    env = {**os.environ, "PYTHONPATH": str(scratch)}

    def run(*words: str, code: int = 0) -> Result:
        done = fork_server(*words, code=COMMAND_OF_A_COPY, env=env)
        assert done.code == code, (words, done.err)
        return done

    return run


def test_the_recipes_work(corpus: Path, extended: Gpt) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines()
    rows = "".join(f"{number}\t{line}\n" for number, line in enumerate(lines))
    Path("story.tsv").write_text(f"id\ttext\n{rows}", encoding="utf-8")
    tiny = [word for word in TINY if not word.startswith("tokenizer")]
    overrides = [part for word in (*tiny, "name=r", "data.source=story.tsv", "tokenizer.name=ascii",
                                   "optim.name=lion", "optim.lr=1e-3",
                                   "optim.schedule=inverse_sqrt")
                 for part in ("-s", word)]  # fmt: skip
    assert "fables" in extended("prepare", "--list").out
    assert "ascii (129 ids" in extended("prepare", *overrides).out
    planned = extended("train", *overrides, "--dry-run", "--json").json
    extended("train", *overrides)
    resumed = extended("train", "--resume", *overrides, "-s", "train.max_steps=6")
    assert "train_loss" in resumed.out
    extended("generate", "--checkpoint", "r", "The")
    said = extended("vocabulary", "--checkpoint", "r", "--count", "3").out
    assert len(said.splitlines()) == 3
    said = extended("export", "--checkpoint", "r", "--to", "plain", "r.safetensors").out
    assert "read back: largest logit difference 0" in said
    assert "'ascii'" in extended("export", "--checkpoint", "r", "--to", "hf", "out", code=2).err
    other = ("prepare", "story.tsv", "--out", "data/x", "-s", "data.text_field=x")
    assert "no field 'x'; the fields are: id, text" in extended(*other, code=3).err

    manifest = json.loads(Path("data/story/manifest.json").read_text(encoding="utf-8"))
    assert manifest["documents"] == len(lines)
    assert planned["memory_bytes"]["optimizer"] == 4 * planned["parameters"]  # one average each
    assert "lr around" not in json.dumps(planned["advice"])
    lines = Path("runs/r/metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "lr" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row["lr"] == pytest.approx(1e-3 / row["step"] ** 0.5) for row in steps)


def test_the_recipes_change_what_they_name_and_nothing_else(tmp_path: Path, extended: Gpt) -> None:
    for check in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *check, "."]
        subprocess.run(command, check=True, cwd=tmp_path / "scratch")
    told = (DOCS / "config.md").read_text(encoding="utf-8").splitlines()
    changed = set(extended("config", "schema", "--markdown").out.splitlines()) - set(told)
    assert {line.split("`")[1] for line in changed} == {
        "optim.name", "optim.schedule", "tokenizer.name",
    }  # fmt: skip
    assert "inverse_sqrt" in json.dumps(extended("config", "schema").json)
    headings = re.findall(r"^## (.+)$", (DOCS / "extend.md").read_text(), re.MULTILINE)
    assert headings == ["A dataset", "A file format", "An optimizer", "A schedule", "A command",
                        "A tokenizer", "An export target"]  # fmt: skip


def test_the_pictures_are_small_and_ask_no_server() -> None:
    pictures = sorted((DOCS / "img").glob("*.svg"))
    assert pictures
    for picture in pictures:
        text = picture.read_text(encoding="utf-8")
        assert len(text) < 60_000
        assert set(re.findall(r"https?://[^\"'\s)]+", text)) <= {
            "http://www.w3.org/2000/svg",
            "https://www.textualize.io",
        }
