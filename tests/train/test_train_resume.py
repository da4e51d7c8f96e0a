"""Work is never lost, and processes share it: checkpoints, signals, kill -9, what can go wrong, torchrun."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("tensorboard")

import train_processes
from images import make_imagefolder
from subprocesses import environment

from barlow_fused.train import checkpoint, evaluate, loader, main, probe, processes, trainer
from barlow_fused.train.config import combine

TINY = ["--batch-size", "32", "--projector", "32-128", "--warmup-epochs", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def training_only(monkeypatch):
    """No evaluation and no pictures."""
    for name in ("look", "accuracy", "pixels", "draw", "knn"):
        monkeypatch.setattr(trainer.Monitor, name, lambda self: None)


def last(run):
    return checkpoint.last(run, pytest.fail)


def numbers(run):
    entries = trainer.read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in entries]


def assert_same_bits(one, other):
    """Two states: steps, weights, batch norms, the optimiser's and the scaler's state."""
    for part in ("step", "model", "optimizer", "scaler"):
        ours, theirs = flat(one[part]), flat(other[part])
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name], name


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value}


# Resuming


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--precision", "fp16", "--accumulate", "2", "--optimizer", "lars", "--batch-size", "8", "--workers", "1"],
        ["--backbone", "mobilenet_v3_small", "--batch-size", "4", "--augmentation", "official", "--optimizer", "sgd"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(flags, tmp_path):
    """Stopped amid an epoch (of 5 steps with 256 images), and resumed beyond it; mobilenet has dropout."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*TINY, "--batch-size", "256", *flags, "--steps", "7", "--out", str(whole)]) == 0
    assert main([*TINY, "--batch-size", "256", *flags, "--steps", "3", "--out", str(parts)]) == 0
    assert main(["--resume", str(parts), "--steps", "7"]) == 0
    assert_same_bits(last(parts), last(whole))
    assert numbers(parts) == numbers(whole)


def test_a_run_resumes_into_a_folder_of_its_own(tmp_path):
    assert main([*TINY, "--steps", "4", "--checkpoint-every", "2", "--out", str(tmp_path / "a")]) == 0
    assert main(["--resume", str(tmp_path / "a"), "--steps", "6", "--out", str(tmp_path / "b")]) == 0
    assert [entry["step"] for entry in numbers(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]
    assert last(tmp_path / "a")["step"] == 4
    assert last(tmp_path / "b")["step"] == 6


def test_what_a_step_depends_on_cannot_change(tmp_path, capsys):
    assert main([*TINY, "--steps", "1", "--out", str(tmp_path)]) == 0
    repeated = ["--resume", str(tmp_path), "--out", str(tmp_path), *TINY, "--preset", "digits", "--steps", "2"]
    assert main(repeated) == 0
    with pytest.raises(SystemExit) as end:
        main([*repeated, "--kappa", "0.1"])
    assert end.value.code == 2
    said = f"--kappa cannot change when a run is resumed; it was {combine({}).kappa}, got 0.1"
    assert said in capsys.readouterr().err


def start(*flags):
    command = [sys.executable, "-m", "barlow_fused", "train", *flags]
    threads = str(torch.get_num_threads())  # as many as here: the same bits
    return subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS=threads), text=True, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for_step(process, run, step):
    deadline = time.monotonic() + 300
    while len(trainer.read_jsonl(run / "metrics.jsonl")) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_that_is_killed_goes_on_with_the_same_bits(tmp_path):
    """kill -9 at a random step; its last checkpoint is a few steps old."""
    run, whole, step = tmp_path / "killed", tmp_path / "whole", random.randrange(2, 12)
    flags = [*TINY, "--steps", "100", "--checkpoint-every", "3"]
    process = start(*flags, "--out", str(run))
    wait_for_step(process, run, step)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    reached = last(run)["step"]
    assert reached <= len(trainer.read_jsonl(run / "metrics.jsonl"))
    assert main(["--resume", str(run), "--steps", str(reached + 5)]) == 0
    assert main([*flags, "--steps", str(reached + 5), "--out", str(whole)]) == 0
    assert_same_bits(last(run), last(whole))
    assert numbers(run) == numbers(whole)


@pytest.mark.parametrize(
    "junk", [b"\0" * 64 + b"\n", b"\xff\xfe garbage\n", b'{"step": 1, "lo\n', b"[1]\n", b'{"loss": 1}\n']
)
def test_damaged_lines_of_a_log_are_left_out(junk, tmp_path):
    run = tmp_path / "run"
    assert main([*TINY, "--data", "fake", "--steps", "2", "--out", str(run)]) == 0
    for name in ("metrics.jsonl", "knn.jsonl"):
        with (run / name).open("ab") as file:
            file.write(junk)
    assert main(["--resume", str(run), "--steps", "4"]) == 0
    assert [entry["step"] for entry in trainer.read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert junk not in (run / "metrics.jsonl").read_bytes()


def test_an_empty_configuration_is_a_sentence(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path)])
    assert "config.toml is empty: a run cannot be resumed without it" in capsys.readouterr().err


def test_one_run_is_not_trained_twice_at_once(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TINY, "--data", "fake", "--steps", "2", "--out", str(run)]) == 0
    with trainer.held(run, processes.start("cpu")):
        assert main(["--resume", str(run), "--steps", "4"]) == 2
    assert "another process is training in this folder" in capsys.readouterr().err
    assert main(["--resume", str(run), "--steps", "4"]) == 0


def test_training_goes_on_when_nobody_reads(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "barlow_fused", "train", *TINY, "--data", "fake", "--steps", "20"]
    command += ["--knn-every", "0", "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    with process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0, said
    assert said.count("Nobody reads what is printed any more; the run goes on.") == 1
    assert last(run)["step"] == 20


def test_ctrl_c_reaches_workers_too_and_still_writes_a_checkpoint(tmp_path):
    """A terminal sends it to every process of the run."""
    process = start(*TINY, "--steps", "100", "--workers", "2", "--out", str(tmp_path))
    wait_for_step(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130, message
    step = last(tmp_path)["step"]
    assert 3 <= step < 100
    assert message == f"Stopped: SIGINT. The state after step {step} is in {checkpoint.path_of(tmp_path, step)}\n"


@pytest.fixture
def signal_in_step_3(monkeypatch):
    """Raises a signal while the third step's views are made."""
    views = loader.Parts.__getitem__

    def set_up(signum):
        def interrupted(parts, item):
            if item == 2:
                signal.raise_signal(signum)
            return views(parts, item)

        monkeypatch.setattr(loader.Parts, "__getitem__", interrupted)

    return set_up


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_answered_by_a_checkpoint(signum, signal_in_step_3, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    signal_in_step_3(signum)
    assert main([*TINY, "--steps", "9", "--out", str(tmp_path)]) == 128 + signum
    assert f"{signum.name}. The state after step 2 is in" in capsys.readouterr().err
    assert last(tmp_path)["step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once():
    with trainer.StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# Checkpoints


def contents():
    return {"model": {"w": torch.arange(1000.0)}, "optimizer": {}, "scaler": {}, "config": {}, "name": "x"}


def test_the_last_checkpoints_are_kept(tmp_path):
    for step in range(5):
        checkpoint.write(tmp_path, step, contents(), keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003.pt", "step-00000004.pt"]
    assert last(tmp_path)["step"] == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(damage, tmp_path):
    for step in (1, 2):
        path = checkpoint.write(tmp_path, step, contents(), keep=3)
    whole = path.read_bytes()
    at = whole.index(torch.tensor(500.0).numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes({"flipped": flipped, "cut": whole[: at + 100], "empty": b"", "text": b"no checkpoint"}[damage])
    said = []
    assert checkpoint.last(tmp_path, said.append)["step"] == 1
    assert len(said) == 1
    assert str(path) in said[0]
    assert "damaged" in said[0]
    checkpoint.path_of(tmp_path, 1).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint that can be read, of 1"):
        checkpoint.last(tmp_path, said.append)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model"), "lacks model"),
        (lambda state: state["model"].pop("projector.0.weight"), "of another model: projector.0.weight"),
        (lambda state: state["model"].update({"projector.0.weight": torch.zeros(3, 3)}), "(3, 3) in the file"),
    ],
)
def test_a_state_of_something_else_is_a_sentence(change, said, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TINY, "--steps", "1", "--out", str(run)]) == 0
    for path in (run / "checkpoints").iterdir():
        state = checkpoint.load(path)
        change(state)
        checkpoint.save(state, path)
    for program, flags in ((main, ["--resume", str(run), "--steps", "2"]), (probe.main, [str(run)])):
        capsys.readouterr()
        assert program(flags) == 1
        printed = capsys.readouterr()
        assert said in printed.out + printed.err
        assert "Traceback" not in printed.err


def test_fewer_steps_than_were_made_are_refused(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*TINY, "--data", "fake", "--steps", "3", "--out", str(run)]) == 0
    before = (run / "config.toml").read_bytes()
    assert main(["--resume", str(run), "--steps", "2"]) == 2
    assert "has made 3 steps already" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before


def test_a_run_goes_on_from_the_last_whole_checkpoint(tmp_path, capsys):
    assert main([*TINY, "--steps", "4", "--checkpoint-every", "2", "--out", str(tmp_path)]) == 0
    uninterrupted = last(tmp_path)
    path = checkpoint.path_of(tmp_path, 4)
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(["--resume", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{path} is damaged" in out
    assert "Resumed after step 2" in out
    assert_same_bits(last(tmp_path), uninterrupted)


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"step": 1}, path)

    def fail(contents, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.save({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# What goes wrong


@contextlib.contextmanager
def largest_file(size):
    """Writing beyond so many bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_with_a_message_and_keeps_the_state(tmp_path, capsys):
    assert main([*TINY, "--steps", "2", "--out", str(tmp_path)]) == 0
    before = last(tmp_path)
    with largest_file(100_000):
        assert main(["--resume", str(tmp_path), "--steps", "4"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"Stopped: {checkpoint.path_of(tmp_path, 4)} could not be written: File too large")
    assert message.count("\n") == 1
    assert_same_bits(last(tmp_path), before)
    assert main(["--resume", str(tmp_path), "--steps", "4"]) == 0
    assert last(tmp_path)["step"] == 4


def test_a_run_that_diverges_stops_with_a_message_and_keeps_its_state(tmp_path, capsys):
    argv = [*TINY, "--steps", "4", "--out", str(tmp_path), "--lr-weights", "1e38", "--warmup-epochs", "0"]
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert message.startswith("Stopped: ")
    assert "step 1" in message
    good = last(tmp_path)
    assert good["step"] == 0
    assert all(tensor.isfinite().all() for tensor in good["model"].values())
    assert torch.load(tmp_path / "diverged.pt", weights_only=True)["step"] == 1


def test_a_loss_that_is_nan_stops_before_the_weights_are_touched(tmp_path, capsys, monkeypatch):
    views = loader.Parts.__getitem__

    def poisoned(parts, item):
        view_a, view_b = views(parts, item)
        return (view_a.fill_(torch.nan) if item == 2 else view_a), view_b

    monkeypatch.setattr(loader.Parts, "__getitem__", poisoned)
    assert main([*TINY, "--steps", "4", "--out", str(tmp_path)]) == 1
    assert "the loss is nan at step 3" in capsys.readouterr().err
    state = last(tmp_path)
    assert state["step"] == 2
    assert all(parameter.isfinite().all() for name, parameter in state["model"].items() if "running" not in name)


def test_an_unreadable_image_stops_with_its_name_and_the_run_goes_on_once_it_is_whole(tmp_path, capsys):
    folder = make_imagefolder(tmp_path / "images", images=6)
    argv = ["--data", f"imagefolder:{folder}", "--backbone", "tiny", "--image-size", "16", "--projector", "16-32"]
    argv += ["--batch-size", "4", "--steps", "3", "--precision", "fp32", "--workers", "1", "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    parts = loader.Parts(*images_and_config(tmp_path / "whole"), trainer.Processes(0, 0, 1))
    path = Path(parts.images.train.samples[parts.part_of(0, 2, 0)[1]][0])  # of the third step
    good = path.read_bytes()
    seen_first = trainer.some
    path.write_bytes(good[:200])
    try:
        trainer.some = lambda images, config: [parts.part_of(0, 0, 0)[0]] * 4  # not by the look at the beginning
        assert main([*argv, "--out", str(tmp_path / "run")]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"Stopped: {path} cannot be read")
        assert "Traceback" not in message
        assert last(tmp_path / "run")["step"] == 2
        path.write_bytes(good)
        assert main(["--resume", str(tmp_path / "run")]) == 0
    finally:
        trainer.some = seen_first
    assert last(tmp_path / "run")["step"] == 3


def images_and_config(run):
    config = trainer.parse_args(["--config", str(run / "config.toml")])
    return trainer.load_images(config, trainer.Processes(0, 0, 1)), config


# Several processes


def torchrun(count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*command, *arguments], env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, train_processes.__file__, str(folder)]
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def values(run):
    entries = trainer.read_jsonl(run / "metrics.jsonl")
    return torch.tensor([[entry[name] for name in ("loss", "on_diag", "off_diag", "lr")] for entry in entries])


def whole(state):
    """Tensors in place of rows in several files."""
    return {name: x.read(0, x.shape[0]) if hasattr(x, "read") else x for name, x in state.items()}


ALIKE = ["fused", "reference", "accumulated", "official", "official reference"]
ALIKE += ["last layer", "last layer accumulated", "last layer official"]
ALIKE += ["sharded", "sharded sgd", "sharded adamw", "sharded accumulated", "sharded lars"]


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one(name, two_processes, tmp_path):
    """The same global batch, SyncBatchNorm, float64: every loss, and the weights and batch norms at the end.

    The official gradient is half of it with two processes: there one process takes half the learning rate. With the
    last layer in the loss two processes train as one does without.
    """
    flags = ["--lr-weights", "1e-3", "--lr-biases", "1e-3"] if "official" in name or name == "sharded sgd" else []
    flags += ["--no-fused-projector"] if name.startswith("last layer") else []
    train_processes.train(tmp_path, name, *flags)
    one, two = tmp_path / name, two_processes / name
    torch.testing.assert_close(values(two)[:, :3], values(one)[:, :3], rtol=1e-9, atol=0)
    state, expected = whole(last(two)["model"]), last(one)["model"]
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-8, atol=1e-10)


def test_two_processes_without_synchronised_statistics_differ(two_processes):
    synchronised, own = (values(two_processes / name)[:, 0] for name in ("fused", "own batch norm"))
    assert ((synchronised - own).abs() / synchronised).max() > 1e-4


def test_two_processes_resume_with_the_same_bits(two_processes):
    assert_same_bits(last(two_processes / "resumed"), last(two_processes / "fused"))


def test_two_processes_share_the_evaluation(two_processes, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "DRAWS", 1)
    train_processes.train(tmp_path, "evaluated")
    one, two = tmp_path / "evaluated", two_processes / "evaluated"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert results[0].keys() == results[1].keys()
    for name, accuracies in results[0].items():
        assert results[1][name] == pytest.approx(accuracies, abs=1.5)  # percent: a few images near a decision


def test_the_command_runs_under_torchrun(tmp_path):
    """Fake images, float32; everything is written and printed once."""
    flags = [*TINY, "--data", "fake", "--steps", "2"]
    out = torchrun(2, "-m", "barlow_fused", "train", *flags, "--out", str(tmp_path / "two"))
    assert out.count("The run is in") == 1
    assert (tmp_path / "two" / "spectrum.png").exists()
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    torch.testing.assert_close(values(tmp_path / "two"), values(tmp_path / "one"), rtol=1e-4, atol=0)
