"""Checks of what is around the program: disk, caches, its own files, the network, extras."""

import os
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

from gptcli.doctor.check import Check, fail, ok, warn
from gptcli.errors import GptError, StorageError
from gptcli.formatting import size

_WRITTEN = 32 << 20
_LITTLE_DISK = 1 << 30
_SLOW_DISK = 20e6  # bytes a second
_NETWORK_SECONDS = 4.0
_NAME = re.compile(r"[\w.-]+")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")
_NOT_FOR_USERS = {"dev"}


def disk() -> Check:
    """Check that the current folder can be written, how much room there is, and how fast it is."""
    free = shutil.disk_usage(Path.cwd()).free
    room = f"{size(free)} free here"
    try:
        rate = _write_rate(Path.cwd())
    except OSError as error:
        return fail(
            f"{Path.cwd()} cannot be written: {error.strerror}",
            "go to a folder of yours on a disk with room, and work there",
            StorageError.exit_code,
        )
    found = f"{room}, {size(rate)}/s written"
    if free < _LITTLE_DISK:
        return warn(found, "a checkpoint of 124M parameters takes 1.5 GB; free some space")
    if rate < _SLOW_DISK:
        return warn(found, "saving will take long; a local disk is faster than a network's")
    return ok(found)


def _write_rate(folder: Path) -> float:
    """Return how fast a file is written and flushed, bytes a second; nothing is left behind."""
    block = os.urandom(1 << 20)  # some disks compress
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".gpt-doctor-") as file:
        began = time.perf_counter()
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / max(time.perf_counter() - began, 1e-9)


def caches() -> Check:
    """Check that downloads can be kept."""
    from huggingface_hub import constants

    given = os.environ.get("XDG_CACHE_HOME")
    folders = [Path(constants.HF_HUB_CACHE), Path(given) if given else Path.home() / ".cache"]
    for folder in folders:
        try:
            place = next(path for path in (folder, *folder.parents) if path.exists())
            with tempfile.NamedTemporaryFile(dir=place, prefix=".gpt-doctor-"):
                pass
        except OSError as error:
            return warn(
                f"{folder} cannot be written: {error.strerror}",
                "downloads need it: set HF_HOME (or XDG_CACHE_HOME) to a folder of yours",
            )
    return ok(f"{folders[0]}, {size(shutil.disk_usage(place).free)} free")


def tokenizer() -> Check:
    """Check GPT-2's vocabulary in the package, its hash, and that it encodes."""
    from gptcli.tokenizers.bpe import gpt2

    try:
        vocabulary = gpt2()
    except (GptError, OSError) as error:
        return fail(str(error), "install gptcli again: pip install --force-reinstall gptcli")
    text = "Hello, wörld"
    if vocabulary.decode(vocabulary.encode(text).tolist()) != text:
        return fail("gpt2 does not give back what it encoded", "install gptcli again")
    return ok(f"gpt2 in the package, {vocabulary.vocab_size:,} ids, its hash is right")


def examples() -> Check:
    """Check that the shipped examples are there and valid."""
    from gptcli.config.loader import example_files, load_config

    files = example_files()
    try:
        for file in files:
            load_config(str(file))
    except GptError as error:
        return fail(error.message.splitlines()[0], "install gptcli again")
    if not files:
        return fail("no examples in the package", "install gptcli again")
    return ok(", ".join(file.stem for file in files))


def network() -> Check:
    """Ask the Hub for an answer, for a few seconds at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ok("offline by HF_HUB_OFFLINE: the Hub's cache is used, nothing is downloaded")
    problem = _ask(constants.ENDPOINT)
    if problem is not None:
        return warn(
            f"no answer from {constants.ENDPOINT} ({problem})",
            "only downloads need it; HF_ENDPOINT names a mirror, https_proxy a proxy",
        )
    token = ", HF_TOKEN is set" if os.environ.get("HF_TOKEN") else ""
    return ok(f"{constants.ENDPOINT} answers{token}")


def _ask(address: str) -> str | None:
    """Return why `address` does not answer; None if it does, whatever it says."""
    problems: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=_NETWORK_SECONDS).close()
            problems.append(None)
        except urllib.error.HTTPError:
            problems.append(None)
        except (OSError, ValueError) as error:
            problems.append(str(getattr(error, "reason", error)))

    # In a thread of its own: looking a name up knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NETWORK_SECONDS)
    return problems[0] if problems else f"nothing within {_NETWORK_SECONDS:.0f} s"


def extras() -> Check:
    """Say which optional parts are installed."""
    wanted: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("gptcli") or []
    except metadata.PackageNotFoundError:
        return warn("running from a source tree", "pip install it")
    for requirement in requirements:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name and extra and extra[1] not in _NOT_FOR_USERS:
            wanted.setdefault(extra[1], []).append(name[0])
    here = [extra for extra, names in wanted.items() if all(map(_is_installed, names))]
    missing = [extra for extra in wanted if extra not in here]
    found = ", ".join(here) or "none"
    if missing:
        found += f"; not installed: {', '.join(missing)} (pip install 'gptcli[{missing[0]}]')"
    return ok(found)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
