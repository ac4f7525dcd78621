"""A run that was interrupted while Weights & Biases was offline is uploaded whole by one command."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

from roma_core.trainer.metrics import read_records
from tests.cases.trainings import SMALL, build, interrupted
from tests.core.trainer.wandb_server import WandbServer, upload


def test_the_last_sentence_uploads_all_attempts_in_order(tmp_path):
    data = build(tmp_path, [8] * 60)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = WandbServer(listener.getsockname()[1])
    settings = {"epochs": 100_000, "save_every": 20, "log_every": 10, "eval_every": 1000}
    run = tmp_path / "runs with a blank" / "a"
    command = ["finetune", "--data", data, "--run-dir", run.relative_to(tmp_path), *SMALL]
    for name, value in settings.items():
        command += ["--set", f"trainer.{name}={value}"]
    outputs = [
        interrupted(*command, run=run, cwd=tmp_path, ROMA_WANDB_MODE="offline") for _ in range(3)
    ]

    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    for n, output in enumerate(outputs, start=1):
        (sync,) = re.findall("`(wandb sync .*)`", output)
        assert [Path(word) for word in shlex.split(sync) if "offline-run" in word] == folders[:n]
    server.start()
    try:
        upload(outputs[-1], server, tmp_path)
    finally:
        server.stop()
    records = [record for _, record in read_records(run / "metrics.jsonl")]
    rows = server.rows()
    assert [row["trainer/global_step"] for row in rows] == [r["step"] for r in records]
