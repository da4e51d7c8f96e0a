"""How the commands' threads wait: set before PyTorch is loaded, and nowhere else."""

import os
import subprocess
import sys

import pytest

from barlow_fused import waiting

SCRIPT = """
import os, sys
sys.argv, sys.orig_argv = eval(sys.argv[1])
import barlow_fused
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("argv", "orig_argv", "user", "expected"),
    [
        (["-m"], ["python", "-m", "barlow_fused", "train"], {}, "PASSIVE 1000"),
        (["-m"], ["python", "-u", "-m", "barlow_fused.train"], {}, "PASSIVE 1000"),
        (["/usr/bin/barlow-fused"], ["python", "/usr/bin/barlow-fused", "plan"], {}, "PASSIVE 1000"),
        (["-m"], ["python", "-m", "barlow_fused", "train"], {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        (["-m"], ["python", "-m", "barlow_fused", "train"], {"GOMP_SPINCOUNT": "7"}, "None 7"),
        (["train.py"], ["python", "train.py"], {}, "None None"),
        (["-m"], ["python", "-m", "my_training"], {}, "None None"),
    ],
)
def test_only_commands_choose_and_only_for_those_who_have_not(argv, orig_argv, user, expected):
    environment = {k: v for k, v in os.environ.items() if k not in waiting.SETTINGS} | user
    command = [sys.executable, "-c", SCRIPT, repr((argv, orig_argv))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_it_is_not_done_too_late(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["barlow-fused"])
    for name in waiting.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert waiting.is_command()
    waiting.set_policy()  # PyTorch is loaded
    assert not waiting.SETTINGS.keys() & os.environ.keys()
