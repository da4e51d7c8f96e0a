"""The command line: plan, doctor, train, and what it says to wrong arguments."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from subprocesses import environment

from barlow_fused import __version__, backends, choice, configure, doctor, nvcc
from barlow_fused.__main__ import main
from barlow_fused.planning.network import Network
from barlow_fused.planning.plan import plan


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``python -m barlow_fused`` in a process of its own."""
    command = [sys.executable, "-m", "barlow_fused", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_plan_prints_the_plan(capsys):
    assert main(["plan", "--n", "2048", "--d", "65536", "--dtype", "bfloat16", "--device", "h200"]) == 0
    assert capsys.readouterr().out == f"{plan(2048, 65536, torch.bfloat16, device='h200')}\n"


def test_plan_takes_a_backend_that_only_the_named_gpu_can_run(capsys):
    assert main(["plan", "--n", "2048", "--d", "65536", "--device", "h200", "--backend", "triton"]) == 0
    assert capsys.readouterr().out == f"{plan(2048, 65536, device='h200', backend='triton')}\n"


def test_every_flag_of_plan_reaches_it(capsys):
    flags = ["--dtype", "float16", "--device", "a100", "--world-size", "4", "--route", "direct", "--backend", "torch"]
    flags += ["--latency", "2", "--intra", "300", "--inter", "25", "--ranks-per-node", "2", "--lambd", "0.5"]
    assert main(["plan", "--n", "64", "--d", "256", *flags, "--json"]) == 0
    network = Network(2e-6, 300e9, 25e9, 2)
    asked = {"world_size": 4, "route": "direct", "backend": "torch", "network": network, "lambd": 0.5}
    expected = plan(64, 256, torch.float16, "a100", **asked)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected.to_dict()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "1"], "n must be at least 2, got 1"),
        (["--n", "64", "--world-size", "3"], "n must be divisible by world_size"),
        (["--n", "64", "--device", "h300"], "device must be 'cpu'"),
        (["--n", "64", "--world-size", "2", "--inter", "0"], "inter must be above 0, got 0.0"),
        (["--n", "64", "--route", "dual"], "route must be one of"),
        (["--n", "64", "--backend", "cuda", "--device", "cpu"], "backend='cuda' cannot run on cpu"),
    ],
)
def test_a_bad_value_is_answered_by_one_sentence(flags, message, capsys):
    assert main(["plan", "--d", "256", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"barlow-fused plan: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["fly"],
        ["plan"],
        ["plan", "--n", "64", "--d", "256", "--speed", "9"],
        ["plan", "--n", "many", "--d", "256"],
        ["plan", "--n", "64", "--d", "256", "--dtype", "int8"],
        ["doctor", "--n", "64"],
        ["--print-completion", "fish"],
    ],
)
def test_wrong_flags_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: barlow-fused" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("plan", "doctor", "verify", "train", "evaluate"))


def test_without_arguments_it_says_what_there_is(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["plan", "--help"],
        ["train", "--help"],
        ["evaluate", "-h"],
        [],
        ["plan"],
        ["train", "--batch-size", "1"],
    ],
)
def test_what_needs_no_torch_does_not_load_it(argv):
    """So that --help takes a twentieth of a second."""
    code = f"""
import sys
from barlow_fused.__main__ import main
try:
    main({argv})
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment()).returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        main(["--print-completion", shell])
    assert exit_.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("doctor", "world-size", "bfloat16"))
    if importlib.util.find_spec("tomli_w"):
        assert all(word in script for word in ("kappa", "lr-classifier"))


def test_completion_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as exit_:
        main(["--print-completion", "bash"])
    assert exit_.value.code == 2
    assert "pip install 'barlow-fused[completion]'" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"barlow-fused {__version__}\n"


def test_doctor_prints_what_this_machine_can_run(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    text = " ".join(out.split())
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "backends on cpu auto torch torch usable" in text
    assert "backend='cuda' cannot run on cpu" in text


def test_doctor_in_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["system"]["barlow_fused"] == __version__
    assert found["backends"]["cpu"]["why_unusable"]["torch"] is None
    assert "cannot run" in found["backends"]["cpu"]["why_unusable"]["cuda"]
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_doctor_shows_what_is_set_and_what_is_wrong_with_it(monkeypatch):
    monkeypatch.setenv("BARLOW_FUSED_ROUTE", "dual")
    choice.forget()
    with configure(backend="reference"):
        text = " ".join(doctor.format_report(doctor.report()).split())
    assert "BARLOW_FUSED_ROUTE dual" in text
    assert "configure(backend=) reference" in text
    assert "problem BARLOW_FUSED_ROUTE must be one of" in text


def test_doctor_describes_a_machine_with_gpus():
    found = doctor.report()
    found["gpus"] = [{"device": "cuda:0", "name": "NVIDIA H200", "architecture": "sm_90", "memory_bytes": 141 * 2**30}]
    found["cuda"] = {"runtime": "CUDA 13.2", "driver": "590.1", "nvcc": None, "extension": "not built", "warning": None}
    found["extras"] = {"torchvision": "0.29", "monai": None}
    text = " ".join(doctor.format_report(found).split())
    assert "driver 590.1 nvcc not found extension not built cuda:0 NVIDIA H200, sm_90, 141 GiB" in text
    assert "torchvision 0.29 monai not installed" in text


def test_doctor_says_what_the_extension_is_built_for(monkeypatch):
    cuda = backends.load("cuda", torch.device("cuda"))
    built = types.SimpleNamespace(cuda_version="13.0.88", architectures="sm_80 sm_90a", emulated=False)
    try:
        cuda.use(built)
        assert doctor.report()["cuda"]["extension"] == "built with CUDA 13.0.88 for sm_80 sm_90a"
        monkeypatch.setitem(sys.modules, "barlow_fused._cuda", None)  # as if it were not there
        cuda.use(None)
        assert "BARLOW_FUSED_CUDA=1" in doctor.report()["cuda"]["extension"]
    finally:
        monkeypatch.undo()
        cuda.use(None)


def test_the_compiler_is_found_where_the_build_looks(tmp_path, monkeypatch):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find() == str(compiler)
    monkeypatch.setenv("CUDACXX", sys.executable)
    assert nvcc.find() == sys.executable


def test_train_gets_the_rest_of_the_arguments(monkeypatch):
    trainer = pytest.importorskip("barlow_fused.train.trainer")
    seen = []
    monkeypatch.setattr(trainer, "main", lambda argv: seen.append(argv))
    assert main(["train", "--epochs", "1"]) == 0
    assert seen == [["--epochs", "1"]]


def fail_to_import(monkeypatch, name):
    """As if the module ``name``, which the trainer imports, were not installed."""

    def import_module(module, namespace=None, local=None, fromlist=(), level=0):
        if level and "train" in module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, namespace, local, fromlist, level)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", import_module)


def test_train_without_its_extra_says_what_to_install(monkeypatch, capsys):
    fail_to_import(monkeypatch, "torchvision.datasets")
    assert main(["train", "--epochs", "1"]) == 2
    message = capsys.readouterr().err
    assert "'torchvision.datasets'" in message
    assert "pip install 'barlow-fused[train]'" in message
    assert message.count("\n") == 1


def test_a_fault_of_the_trainer_itself_is_not_blamed_on_an_extra(monkeypatch):
    fail_to_import(monkeypatch, "barlow_fused.train.missing")
    with pytest.raises(ModuleNotFoundError):
        main(["train"])


def test_the_commands_run_as_a_process():
    planned = run("plan", "--n", "256", "--d", "8192", "--device", "h200", BARLOW_FUSED_ROUTE="direct")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "direct: set by BARLOW_FUSED_ROUTE" in planned.stdout
    refused = run("plan", "--n", "1", "--d", "8192")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "barlow-fused plan: n must be at least 2, got 1\n"


def test_doctor_runs_without_the_optional_libraries():
    absent = "; ".join(f"sys.modules[{name!r}] = None" for name in ("rich", "torchvision", "sklearn", "matplotlib"))
    code = f"import sys; {absent}; from barlow_fused.__main__ import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "backends on cpu" in done.stdout
