"""What several processes of one training read and check before its first step."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from roma_core.files import read_json
from tests.core.hand_made import built, flip_a_byte, series
from tests.time_limits import within

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
WATCHED = """
import os, pathlib, time
import roma_core.files as files
rank, folder, sha256_of = os.environ.get("RANK", "0"), os.environ["WATCH"], files.sha256_of
def watched(path):
    with open(os.path.join(folder, f"hashed-{rank}"), "a") as file:
        print(path, file=file)
    return sha256_of(path)
files.sha256_of = watched
if rank == "0":
    time.sleep(4)  # the other process gets everywhere first
else:  # and does not see the newest checkpoint yet
    glob = pathlib.Path.glob
    def late(path, pattern):
        return sorted(glob(path, pattern))[: -1 if pattern == "step-*" else None]
    pathlib.Path.glob = late
"""


SETTINGS = ("epochs=4", "batch_size=4", "save_every=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def data(folder):
    some = [series(f"s{k}", 6, "xy"[k % 2], "train", seed=k) for k in range(24)]
    return built(folder / "data", *some, *[series("t", 6, "x", "test")])


@pytest.fixture(scope="module")
def trained(folder, data):
    """How many files of the data set each process of a finished training hashed."""
    torchrun(folder, data, *SETTINGS, "eval_every=4")
    return hashed(folder, data)


def torchrun(folder, data, *settings, code=0) -> str:
    """``roma finetune`` on two processes, the first of which starts late."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(WATCHED)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command += ["-m", "roma_core.cli", "finetune", "--data", data, "--run-dir", folder / "run"]
    command += ["--set", "model.encoder_config={d_model: 8, nhead: 1, depth: 1}"]
    for setting in settings:
        command += ["--set", f"trainer.{setting}"]
    environment = {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", "WATCH": str(folder)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=within(60),
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def hashed(folder, data) -> list[int]:
    """How many files of the data set each process hashed since the last call."""
    counts = []
    for rank in (0, 1):
        log = folder / f"hashed-{rank}"
        counts.append(log.read_text().count(str(data)) if log.exists() else 0)
        log.unlink(missing_ok=True)
    return counts


def test_all_processes_have_the_settings_that_the_first_one_writes(folder, data, trained):
    """At the start, and when a run resumes with changed ones; one of them reads the data set whole."""
    n_files = len(read_json(data / "manifest.json")["files"])
    assert trained == [n_files, 0]
    for path in (folder / "run/checkpoints").glob("step-*"):
        if path.name > "step-00000006":
            shutil.rmtree(path)
    output = torchrun(folder, data, *SETTINGS, "eval_every=2")
    assert "resumes with trainer.eval_every 4 → 2" in output
    assert "resumed from step-00000006" in output
    assert hashed(folder, data) == [n_files, 0]


def test_a_damaged_data_set_fails_on_every_process_with_one_sentence(folder, data, trained):
    flip_a_byte(data / "values.npy")
    (folder / "run/result.json").unlink()
    output = torchrun(folder, data, *SETTINGS, "eval_every=2", code=1)
    flip_a_byte(data / "values.npy")
    assert output.count("is damaged: values.npy") >= 2
    assert "is damaged" in read_json(folder / "run/attempts/1/exit.json")["reason"]


@pytest.mark.parametrize(
    ("environment", "settings", "threads"),
    [({}, {}, 1), ({"OMP_NUM_THREADS": "2"}, {}, 2), ({"OMP_NUM_THREADS": "2"}, {"threads": 1}, 1)],
)
def test_a_training_uses_the_threads_that_its_job_reserves(environment, settings, threads):
    code = (
        "import torch; from roma_core import TrainerConfig\n"
        "from roma_core.trainer.distributed import init_accelerator\n"
        f"init_accelerator(TrainerConfig(**{settings})); print(torch.get_num_threads())"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(threads)]
