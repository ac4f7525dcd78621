"""The benchmark of a GPU, in miniature on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from roma_core import EncoderConfig
from tests.benchmarks import gpu, workloads

WORKLOADS = ("W2, batch 512", "W3, batch 512", "W1, batch 512", "W4s, batch 512", "W4i, batch 512")


@pytest.fixture
def shallow(monkeypatch):
    stack = EncoderConfig(d_model=192, nhead=3, depth=1)
    stacks = {"encoder_config": stack, "decoder_config": stack}
    for name in ("STACK", "IMAGE_STACK", "DECODER"):
        monkeypatch.setattr(workloads, name, stack)
    config = workloads.SERIES_CONFIG.model_copy(update=stacks)
    monkeypatch.setattr(workloads, "SERIES_CONFIG", config)


def test_a_dry_run_goes_through_every_part_and_writes_what_it_measured(
    shallow, tmp_path, monkeypatch
):
    others = ("tests", "peak", "evaluation", "loader", "trainer", "attention")
    chosen = {name: gpu.PARTS[name] for name in (*others, *WORKLOADS)}  # the rest repeats these
    monkeypatch.setattr(gpu, "PARTS", chosen)
    threads = torch.get_num_threads()
    code = gpu.main(["--dry-run", "--out", str(tmp_path / "gpu.json")])
    torch.set_num_threads(threads)

    report = json.loads((tmp_path / "gpu.json").read_text())
    parts = report["parts"]
    assert code == 0 and report["dry_run"] and report["hardware"]["torch"]
    assert {name: p["reason"] for name, p in parts.items() if p["status"] != "done"} == {
        "tests": "they need a GPU"
    }
    assert list(parts) == list(chosen)
    assert "tests/core/model/test_gpu.py" in parts["tests"]["result"]["files"]
    for name in WORKLOADS:
        result = parts[name]["result"]
        assert result["padding"] >= 1 and result["tflop"] > 0
        assert {"published", "ours"} <= result["contenders"].keys()
        for row in result["contenders"].values():
            assert row["ms"] > 0 and row["x_published"] > 0 and row["kernels"] > 0
            assert row["share_of_rate"] > 0 and row["share_of_peak"] > 0
    waits = parts["W2, batch 512"]["result"]["contenders"]
    assert waits["ours"]["host_waits"] == 0 < waits["published"]["host_waits"]
    assert {"evaluation_per_s", "exported_per_s"} <= parts["evaluation"]["result"].keys()
    assert parts["trainer"]["result"]["train/tokens_per_s"] > 0
    for rows in (parts["attention"]["result"][dtype] for dtype in gpu.DTYPES):
        assert {body for body, row in rows.items() if row["difference"] < 0.02} == set(rows)
        assert len(rows) == 4


def test_a_part_that_takes_too_long_keeps_what_it_measured_and_the_next_one_is_done(tmp_path):
    def endless(run, result):
        result["first"] = 1
        while True:
            try:
                sum(range(1000))
            except Exception:
                pytest.fail("the end of a part's time was taken for an error")

    def broken(run, result):
        raise ValueError("no such kernel")

    def quick(run, result):
        result["second"] = 2

    run = gpu.Run("cpu", True, {"parts": {}})
    parts = {"endless": (0.1, endless), "broken": (9, broken), "quick": (9, quick)}
    gpu.measure(run, parts, 60, tmp_path / "gpu.json")
    gpu.measure(run, {"late": (9, quick)}, 0, tmp_path / "gpu.json")

    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    statuses = {name: (part["status"], part["result"]) for name, part in found.items()}
    assert statuses == {
        "endless": ("cut", {"first": 1}),
        "broken": ("failed", {}),
        "quick": ("done", {"second": 2}),
        "late": ("skipped", {}),
    }
    assert found["broken"]["reason"] == "ValueError: no such kernel"


def test_only_files_without_their_packages_may_be_left_out():
    found = gpu.outcomes("""
tests/core/model/test_gpu.py::test_a[dtype0-False] PASSED [ 50%]
tests/core/model/test_gpu.py::test_b FAILED  [100%]
______________ ERROR collecting tests/core/evaluation/test_job.py ______________
tests/core/evaluation/test_job.py:8: in <module>
E   ModuleNotFoundError: No module named 'pyarrow'
______________ ERROR collecting tests/core/serving/test_package.py ______________
E   ModuleNotFoundError: No module named 'roma_core.packages'
=========================== short test summary info ============================
FAILED tests/core/model/test_gpu.py::test_b - AssertionError
ERROR tests/core/evaluation/test_job.py
ERROR tests/core/serving/test_package.py
""")
    assert found == {
        "counts": {"passed": 1, "failed": 1, "skipped": 0},
        "left_out": ["left out tests/core/evaluation/test_job.py: No module named 'pyarrow'"],
        "failed": ["tests/core/model/test_gpu.py::test_b", "tests/core/serving/test_package.py"],
    }
