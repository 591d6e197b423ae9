"""`gpt serve`: models over HTTP, for OpenAI's clients and for people."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from gptcli.commands import complete, generate, options
from gptcli.errors import ConfigError
from gptcli.terminal import console

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        metavar="PATH",
        help="As for generate; repeatable. Default: the newest run's best.",
        autocompletion=complete.runs,
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; others need --api-key-file.")]
KeyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File of API keys, one per line.")
]
MaxTexts = Annotated[
    int, typer.Option(min=1, max=1024, help="Texts that are generated at the same time.")
]
Deadline = Annotated[
    float, typer.Option(metavar="SECONDS", min=0.1, help="Time limit of a request.")
]
Drain = Annotated[
    float, typer.Option(metavar="SECONDS", min=0, help="Time to finish requests after SIGTERM.")
]


def serve(
    checkpoint: Checkpoints = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")] = 8000,
    open_: Annotated[bool, options.flag("--open", "Open the page in a browser.")] = False,
    api_key_file: KeyFile = None,
    max_texts: MaxTexts = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="Further texts that may wait.")] = 128,
    deadline: Deadline = 600.0,
    drain: Drain = 30.0,
    quantize: generate.Quantize = None,
    json_: options.JsonOption = False,
) -> None:
    """Serve checkpoints to OpenAI's clients, with a page to try them."""
    if importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("gpt serve needs uvicorn", "pip install 'gptcli[serve]'")
    keys = _keys(api_key_file, host)
    # So many texts are what weights are chosen for.
    settings = options.over_run(config, set_, {"generate.num_samples": 8})
    from gptcli.serving.server import bind

    with bind(host, port) as listener:  # before models are opened, which takes a while
        import torch

        from gptcli.device import available_memory
        from gptcli.serving.app import LOOPBACK, App, Limits
        from gptcli.serving.engine import Engine
        from gptcli.serving.models import Models
        from gptcli.serving.server import serve as answer

        n_bytes = (available_memory(torch.device("cpu")) or 1 << 32) // 2
        models = Models(
            checkpoint or [None], settings, int8=quantize is not None, max_bytes=n_bytes
        )
        engine = Engine(max_texts=max_texts, max_waiting=max_waiting)
        app = App(engine, models, Limits(keys, None if keys else LOOPBACK, deadline))
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"

        def on_ready() -> None:
            if json_:
                console.result_json({"url": url, "models": list(models.served)})
            else:
                console.message(f"serving {', '.join(models.served)} at {url} (Ctrl-C stops it)")
            if open_:
                import threading
                import webbrowser

                # Some browsers return when they are closed: the server must answer them first.
                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        raise typer.Exit(answer(app, engine, listener, drain_seconds=drain, on_ready=on_ready))


def _keys(file: Path | None, host: str) -> list[str]:
    """Return the API keys of a file; any address but this machine's needs one."""
    if file is None:
        if host in _LOOPBACK:
            return []
        raise ConfigError(
            f"--host {host}: anyone who can reach this machine could use the server",
            "set a key: --api-key-file FILE",
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"--api-key-file {file}: {why}") from error
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {file}: no keys in the file", "write one key per line")
    return keys
