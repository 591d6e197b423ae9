"""The picture of a sweep."""

from pathlib import Path

from gptcli.plotting.figure import draw_sweep


def test_each_key_has_a_panel_whatever_its_values() -> None:
    keys = {"optim.lr": True, "optim.schedule": False, "model.n_kv_head": False}
    trials = [
        ({"optim.lr": 1e-2, "optim.schedule": "wsd", "model.n_kv_head": None}, [1.0, 1.1]),
        ({"optim.lr": 1e-3, "optim.schedule": "cosine", "model.n_kv_head": 2}, [1.2, 1.3]),
    ]
    for name in ("sweep.svg", "again.svg"):
        draw_sweep(keys, trials, Path(name))
    assert Path("sweep.svg").read_bytes() == Path("again.svg").read_bytes()
    draw_sweep(dict(list(keys.items())[:1]), trials[:1], Path("one.pdf"))
    assert Path("one.pdf").read_bytes().startswith(b"%PDF")
