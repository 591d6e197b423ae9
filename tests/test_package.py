"""What importing the package does, in processes of their own that load no torch."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("before", "user", "policy"),
    [
        ("", {}, "PASSIVE"),
        ("", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("import sys; sys.modules['torch'] = sys; ", {}, "None"),  # it is too late in a notebook
    ],
    ids=["by itself", "as the user set it", "torch is there already"],
)
@pytest.mark.parametrize("way", ["gptcli", "gptcli.__main__", "gptcli.cli"])
def test_how_threads_wait_is_settled_before_torch_is_loaded(
    way: str, before: str, user: dict[str, str], policy: str
) -> None:
    waits = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {key: value for key, value in os.environ.items() if key not in waits} | user
    code = f"{before}import os, {way}; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == policy, done.stderr
