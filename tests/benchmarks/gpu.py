"""What a GPU makes of the models, in eight minutes: a table, and JSON that is written after every part.

    python -m tests.benchmarks.gpu [--out FILE] [--minutes 8] [--only W2] [--dry-run]

Needs torch, numpy, pydantic-settings, einops, safetensors, accelerate, pytest and this checkout;
Hugging Face's ViTMAE takes part if transformers is installed. The parts run in the order of their
importance, each for a limited time; one that is cut short keeps what it had measured. JSON goes to
``gpu.json`` in ``$OUT`` or the present folder.

    tests       those marked ``gpu``, by pytest; files whose packages are missing are named
    peak        rate of large matrix products, of which shares are given
    W1 … W4i    see ``workloads.py``
    graph       a workload of which ours, with compiled regions, is captured as one CUDA graph: it repeats
                the shapes of one batch, which the trainer, whose shapes vary, cannot do
    width       W2 at widths 432 and 720
    attention   ours beside padded rows, jagged tensors and FlexAttention, both ways
    evaluation  light curves of 130 observations, by the trainer's evaluation and by the exported program
    loader      batches of such series, on the device
    trainer     the training loop on W2's lengths

``--dry-run`` does all but the tests in miniature, on the CPU and without compiling.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roma_core import RoMAForClassification, RoMAForPreTraining, Trainer, TrainerConfig
from roma_core.files import write_json
from roma_core.job import StopRequests
from roma_core.model.config import RoMAForClassificationConfig
from roma_core.model.packing import Segments
from roma_core.trainer.dataloader import Collate, TrainLoader
from roma_core.trainer.distributed import SINGLE_PROCESS
from roma_core.trainer.evaluator import classify
from roma_core.trainer.metrics import read_records
from roma_core.trainer.sampler import make_sampler
from tests.benchmarks import workloads
from tests.benchmarks.parts import Attention, attention_bodies
from tests.benchmarks.timing import Clock, HostReads, Work, host_waits, launches
from tests.benchmarks.workloads import Curves, Setting, _lengths, make

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OBSERVATIONS = 130  # of a light curve of PLAsTiCC, on average
_SLOW_TO_START = ("compiled", "graph", "published, compiled")


class OutOfTime(BaseException):
    """Not an Exception, so that nothing on its way takes it for an error of its own."""


@dataclass
class Run:
    """What the parts share."""

    device: str
    is_dry: bool
    report: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # FLOP/s by dtype

    @property
    def clock(self) -> Clock:
        return Clock(self.device, 1)

    @property
    def repeats(self) -> int:
        return 1 if self.is_dry else 7


Part = Callable[[Run, dict[str, Any]], None]
"""Fills the dictionary as it measures."""


# --- the parts ---------------------------------------------------------------------------------


def run_tests(run: Run, result: dict[str, Any]) -> None:
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    options = ["-m", "gpu", "-v", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files]
    result["files"] = files
    if run.is_dry:
        result["skipped"] = "they need a GPU"
        return
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait()
        finally:
            process.kill()
            process.wait()
            output.seek(0)
            text = output.read()
            result |= outcomes(text)
            result["output_tail"] = text[-6000:]
    for reason in result["left_out"] + result["failed"]:
        print(f"  {reason}")
    if result["failed"] or not result["counts"]["passed"]:
        raise RuntimeError(f"{result['counts']}; pytest returned {process.returncode}")


def outcomes(output: str) -> dict[str, Any]:
    """Counts, failures and files without their packages, from the output of ``pytest -v -rfE``."""
    counts = {
        word.lower(): len(re.findall(rf"^\S+::.* {word}\b", output, re.MULTILINE))
        for word in ("PASSED", "FAILED", "SKIPPED")
    }
    missing = {}
    for block in output.split("_ ERROR collecting ")[1:]:
        error = re.search(r"^E +ModuleNotFoundError: (.*)$", block, re.MULTILINE)
        if error and not re.search(r"'(roma_|tests)", error[1]):  # those would be mistakes of ours
            missing[block.split()[0]] = error[1]
    found = re.findall(r"^(?:FAILED|ERROR) (\S+).*$", output, re.MULTILINE)
    left_out = [f"left out {path}: {reason}" for path, reason in missing.items()]
    failed = [each for each in found if each not in missing]
    return {"counts": counts, "left_out": left_out, "failed": failed}


def peak(run: Run, result: dict[str, Any]) -> None:
    for name, dtype in DTYPES.items():
        run.peaks[name] = run.clock.matmul_rate(dtype, 192 if run.is_dry else 4096)
        result[name] = run.peaks[name] / 1e12
        print(f"  {name}: {result[name]:.1f} TFLOP/s")


def workload(
    name: str, batch: int, dtype: str = "bf16", width: int = 192, graph: bool = False
) -> Part:
    def part(run: Run, result: dict[str, Any]) -> None:
        setting = Setting(
            DTYPES[dtype],
            run.device,
            2 if run.is_dry else batch,
            compiled=not run.is_dry,
            compile_published=not run.is_dry and width == 192 and not graph,
            graphs=not run.is_dry and graph,
            width=width,
        )
        made = make(name, setting)
        result |= {"padding": made.padding_factor, "real_tokens": made.real_tokens}
        result |= {"tflop": made.flops / 1e12, "contenders": {}}
        rate = run.clock.matmul_rate(setting.dtype, width)
        rows: dict[str, dict[str, Any]] = result["contenders"]
        works: dict[str, Work] = {}
        quick = [c for c in made.contenders if c not in _SLOW_TO_START]
        slow = [c for c in _SLOW_TO_START if c in made.contenders]
        # what compiles comes last, one at a time: a part cut short has the others
        for new in [quick, *([c] for c in slow)]:
            for contender in new:
                rows[contender] = once(run, made.contenders[contender])
                if "error" not in rows[contender]:
                    works[contender] = made.contenders[contender]
            if not works.keys() & set(new):
                continue
            for contender, t in run.clock.interleaved(works, run.repeats).items():
                rows[contender] |= {
                    "ms": t.median * 1e3,
                    "range_ms": [t.low * 1e3, t.high * 1e3],
                    "tokens_per_s": made.real_tokens / t.median,
                    "share_of_rate": made.flops / t.median / rate,
                }
                if dtype in run.peaks:
                    rows[contender]["share_of_peak"] = made.flops / t.median / run.peaks[dtype]
                if "ms" in rows["published"]:  # it comes first
                    rows[contender]["x_published"] = rows["published"]["ms"] / rows[contender]["ms"]
        show(result)

    return part


def once(run: Run, work: Work, counts: bool = True) -> dict[str, Any]:
    """Seconds of the first call; of later ones peak memory, kernels and host waits.

    On a CPU operators take the place of kernels, if ``counts``.
    """
    row: dict[str, Any] = {}
    try:
        row["first_s"] = run.clock.seconds(work)
        work()
    except Exception as error:  # that a contender cannot run is a result, too
        lines = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0][:300]}"}
    if run.device == "cpu":
        if counts:
            with HostReads() as reads:
                work()
            row |= {"kernels": reads.operators, "host_waits": len(reads.found)}
        return row
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return row | {"host_waits": host_waits(work)} | launches(work)


def show(result: dict[str, Any]) -> None:
    head = f"  padding {result['padding']:.2f}, {result['real_tokens']:,} tokens"
    print(
        f"{head:<36}{'ms':>9}{'× published':>12}{'tokens/s':>13}{'of rate':>9}{'of peak':>9}"
        f"{'MiB':>9}{'kernels':>9}{'waits':>7}{'first s':>9}"
    )
    for name, row in result["contenders"].items():
        if "error" in row:
            print(f"    {name:<32}{row['error']}")
        elif "ms" in row:
            print(
                f"    {name:<32}{row['ms']:9.2f}{row.get('x_published', float('nan')):12.2f}"
                f"{row['tokens_per_s']:13,.0f}{row['share_of_rate']:9.0%}"
                f"{row.get('share_of_peak', float('nan')):9.0%}"
                f"{row.get('peak_mib', float('nan')):9,.0f}{row['kernels']:9}{row['host_waits']:7}"
                f"{row['first_s']:9.1f}"
            )


def attention(run: Run, result: dict[str, Any]) -> None:
    lengths = np.sort(_lengths(4 if run.is_dry else 512)).tolist()
    segments = Segments(lengths, run.device)
    bodies = attention_bodies(segments, segments)
    for name, dtype in DTYPES.items():
        generator = torch.Generator().manual_seed(0)
        qkv = [
            torch.randn(segments.total, 3, 64, generator=generator).to(run.device, dtype)
            for _ in range(3)
        ]
        expected = bodies["padded"](*qkv)
        rows: dict[str, dict[str, Any]] = {}
        result[name] = rows
        works: dict[str, Work] = {}
        for body, call in bodies.items():
            # FlexAttention has no gradient on a CPU
            inputs = [x.clone().requires_grad_(run.device == "cuda") for x in qkv]
            works[body] = attention_work(call, inputs, rows.setdefault(body, {}), expected)
            rows[body] |= once(run, works[body], counts=False)
            if "error" in rows[body]:
                del works[body]
        for body, t in run.clock.interleaved(works, run.repeats).items():
            rows[body]["ms"] = t.median * 1e3
        for body, row in rows.items():
            shown = row.get("error") or f"{row['ms']:.2f} ms, differs by {row['difference']:.1e}"
            print(f"  {name} {body:<8} {shown}")


def attention_work(
    call: Attention, inputs: list[Tensor], row: dict[str, Any], expected: Tensor
) -> Work:
    def work() -> None:
        out = call(*inputs)
        if out.requires_grad:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        if "difference" not in row:
            row["difference"] = float((out - expected).abs().max())

    return work


def evaluation(run: Run, result: dict[str, Any]) -> None:
    n, batch = (8, 4) if run.is_dry else (20480, 1024)
    curves = Curves([OBSERVATIONS] * n)
    config = RoMAForClassificationConfig(
        encoder_config=workloads.STACK, dim_output=5, **workloads.SERIES
    )
    model = RoMAForClassification(config).to(run.device)
    collate = Collate(config, 0)

    def evaluate(data: Curves) -> Work:
        def work() -> None:
            with Setting(torch.bfloat16, run.device).amp():
                classify(model, data, collate, batch)

        return work

    evaluate(Curves([OBSERVATIONS] * batch))()
    result["evaluation_per_s"] = n / run.clock.seconds(evaluate(curves))
    result["collate_per_s"] = n / run.clock.seconds(
        lambda: [collate.batch(curves, part) for part in np.array_split(np.arange(n), n // batch)]
    )
    print(f"  evaluation {result['evaluation_per_s']:,.0f} light curves/s, of which ", end="")
    print(f"collating alone {result['collate_per_s']:,.0f}/s")

    exported = model.cpu().export()
    if run.device == "cuda":
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(exported, "cuda:0")
    program = exported.module()
    rows = curves.gather(np.arange(batch))
    tokens, positions = (
        torch.from_numpy(a).view(batch, OBSERVATIONS, -1) for a in (rows.values, rows.positions)
    )
    valid = torch.ones(batch, OBSERVATIONS, dtype=torch.bool)

    def predict() -> None:
        with torch.inference_mode():
            program(*(x.to(run.device) for x in (tokens, positions, valid))).cpu()

    predict()
    result["exported_per_s"] = batch / min(run.clock.seconds(predict) for _ in range(run.repeats))
    print(f"  exported program, fp32, padded {result['exported_per_s']:,.0f} light curves/s")


def loader(run: Run, result: dict[str, Any]) -> None:
    n, batch = (8, 4) if run.is_dry else (16384, 512)
    curves = Curves([OBSERVATIONS] * n)
    for workers in [0] if run.is_dry else [0, 4]:
        config = TrainerConfig(
            batch_size=batch, epochs=1 if run.is_dry else 3, num_dataset_workers=workers
        )
        sampler = make_sampler(config, curves, 1)
        arguments = config, sampler, curves, workloads.SERIES_CONFIG, SINGLE_PROCESS
        with TrainLoader(*arguments, torch.device(run.device), StopRequests()) as made:
            steps = made.steps(0)
            next(steps)  # the workers have started
            start, n_steps = time.perf_counter(), sum(1 for _ in steps)
            seconds = time.perf_counter() - start
        result[f"series_per_s, {workers} workers"] = n_steps * batch / seconds
        print(f"  {workers} workers: {n_steps * batch / seconds:,.0f} series/s")


def trainer(run: Run, result: dict[str, Any]) -> None:
    batch, steps = (2, 2) if run.is_dry else (512, 40)
    curves = Curves(np.tile(_lengths(batch), steps).tolist())
    with tempfile.TemporaryDirectory() as name:
        settings = TrainerConfig(
            batch_size=batch,
            epochs=1,
            log_every=max(1, steps // 4),
            mixed_precision=None if run.is_dry else "bf16",
            log_wandb=False,
            checkpoint_dir=Path(name) / "checkpoints",
        )
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        Trainer(settings).train(curves, None, RoMAForPreTraining(workloads.SERIES_CONFIG))
        records = read_records(settings.checkpoint_dir / "metrics.jsonl")
        metrics = [r["metrics"] for _, r in records if "train/tokens_per_s" in r["metrics"]]
    for key in ("train/tokens_per_s", "train/data_wait_fraction", "train/memory_mb"):
        result[key] = float(np.median([m[key] for m in metrics[1:] or metrics]))
        print(f"  {key} {result[key]:,.3f}")


PARTS: dict[str, tuple[float, Part]] = {
    "tests": (130, run_tests),
    "peak": (10, peak),
    "W2, batch 512": (60, workload("W2", 512)),
    "width 720": (25, workload("W2", 512, width=720)),
    "evaluation": (25, evaluation),
    "W3, batch 512": (50, workload("W3", 512)),
    "W1, batch 512": (50, workload("W1", 512)),
    "W4s, batch 512": (40, workload("W4s", 512)),
    "W2, batch 64": (40, workload("W2", 64)),
    "loader": (20, loader),
    "trainer": (25, trainer),
    "W2, batch 512, graph": (30, workload("W2", 512, graph=True)),
    "W2, batch 64, graph": (20, workload("W2", 64, graph=True)),
    "attention": (40, attention),
    "width 432": (25, workload("W2", 512, width=432)),
    "W3, batch 64": (30, workload("W3", 64)),
    "W1, batch 64": (30, workload("W1", 64)),
    "W4s, batch 64": (30, workload("W4s", 64)),
    "W2, batch 512, fp32": (40, workload("W2", 512, "fp32")),
    "W4i, batch 512": (30, workload("W4i", 512)),
    "W3, batch 64, graph": (20, workload("W3", 64, graph=True)),
    "W1, batch 64, graph": (20, workload("W1", 64, graph=True)),
    "W4s, batch 64, graph": (20, workload("W4s", 64, graph=True)),
}
"""Seconds at most, and the part; in order of importance. A workload's numbers are of bf16 unless named."""


# --- running them ------------------------------------------------------------------------------


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds; another timer of the process is put off."""

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    others, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            left = max(0.001, others - (time.monotonic() - start))
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def measure(run: Run, parts: dict[str, tuple[float, Part]], seconds: float, out: Path) -> None:
    end = time.monotonic() + seconds
    for name, (most, part) in parts.items():
        entry: dict[str, Any] = {"status": "running", "result": {}}
        run.report["parts"][name] = entry
        left = end - time.monotonic()
        print(f"{name}  ({seconds - left:.0f} s)", flush=True)
        start = time.monotonic()
        if left < 5:
            entry |= {"status": "skipped", "reason": f"{left:.0f} of {seconds:.0f} s are left"}
        else:
            try:
                with limit(min(most, left)):
                    part(run, entry["result"])
                entry["status"] = "skipped" if "skipped" in entry["result"] else "done"
                entry["reason"] = entry["result"].pop("skipped", "")
            except OutOfTime:
                entry |= {"status": "cut", "reason": f"{min(most, left):.0f} s were over"}
                if "contenders" in entry["result"]:
                    show(entry["result"])
            except Exception as error:  # the other parts still count; main says so at the end
                entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
        entry["seconds"] = time.monotonic() - start
        if entry["status"] != "done":
            print(f"  {entry['status']}: {entry['reason']}", flush=True)
        write_json(out, run.report)
        if run.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    for package in ("torch", "numpy", "accelerate", "transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_gib": properties.total_memory / 2**30}
        found |= {"capability": [properties.major, properties.minor], "cuda": torch.version.cuda}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a part failed, the tests among them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.json")
    parser.add_argument("--minutes", type=float, default=7.5, help="start-up comes on top")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="begin of names")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run goes through the parts on the CPU")
    parts = {name: part for name, part in PARTS.items() if name.startswith(tuple(args.only))}
    run = Run(device, args.dry_run)
    run.report |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "dry_run": args.dry_run}
    run.report |= {"hardware": hardware(device), "parts": {}}
    print(run.report["at"], run.report["hardware"])
    measure(run, parts, args.minutes * 60, args.out)
    print(f"written to {args.out}")
    return int(any(part["status"] == "failed" for part in run.report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
