"""Speed and memory of the models beside what others would use, interleaved in one process.

    python -m tests.benchmarks.model                       every workload, fp32 and bf16
    python -m tests.benchmarks.model --only W2 --repeats 9
    python -m tests.benchmarks.model --memory              peak memory, a process each
    python -m tests.benchmarks.model --growth              how cost grows with length and batch
    python -m tests.benchmarks.model --device cuda --batch 512

Contenders: the published formulation written anew (``published.py``), Hugging Face's ViTMAE
(needs ``pip install transformers``), PyTorch's TransformerEncoder, ours, and ours with compiled
regions. Prints medians with their spread, ratios to the published formulation, real tokens per
second, and the share of the matmul rate that this computer reached in the same minute.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch

from roma_core.model.config import EncoderConfig, RoMAForClassificationConfig
from roma_core.model.prediction import RoMAForClassification
from tests.benchmarks.timing import Clock
from tests.benchmarks.workloads import NAMES, Setting, make

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="W")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="series or images per step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--eager", action="store_true", help="leave compiled regions out")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--growth", action="store_true", help="cost by length and by batch")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # one process of --memory
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    clock = Clock(args.device, args.threads)
    if args.contender:
        print(peak_memory(args))
        return
    print(
        f"{args.device}, {args.threads} thread(s), {clock}, batch {args.batch}, "
        f"torch {torch.__version__}, {args.repeats} repeats"
    )
    if args.memory:
        compare_memory(args)
    elif args.growth:
        show_growth(args, clock)
    else:
        compare_speed(args, clock)


def compare_speed(args: argparse.Namespace, clock: Clock) -> None:
    print(
        f"{'workload':<9}{'dtype':<6}{'padding':<9}{'contender':<11}{'ms':>7}  {'(min–max)':<14}"
        f"{'× published':>11}  {'real tokens/s':>13}  of matmul rate"
    )
    for dtype_name in args.dtype:
        setting = Setting(DTYPES[dtype_name], args.device, args.batch, compiled=not args.eager)
        for name in args.only:
            workload = make(name, setting)
            rate = clock.matmul_rate(setting.dtype)
            timings = clock.interleaved(workload.contenders, args.repeats)
            for contender, t in timings.items():
                spread = f"({t.low * 1e3:.0f}–{t.high * 1e3:.0f})"
                share = workload.flops / t.median / rate
                print(
                    f"{name:<9}{dtype_name:<6}{workload.padding_factor:<9.2f}{contender:<11}"
                    f"{t.median * 1e3:7.0f}  {spread:<14}"
                    f"{timings['published'].median / t.median:11.2f}  "
                    f"{workload.real_tokens / t.median:13,.0f}  {share:.0%}",
                    flush=True,
                )


def compare_memory(args: argparse.Namespace) -> None:
    """Peak of a process over what it held after imports, for each contender alone."""
    for name in args.only:
        for dtype in args.dtype:
            setting = Setting(DTYPES[dtype], args.device, 2, compiled=not args.eager)
            peaks: dict[str, float] = {}
            for contender in make(name, setting).contenders:
                command = [sys.executable, "-m", __spec__.name, "--only", name, "--dtype", dtype]
                command += ["--device", args.device, "--batch", str(args.batch)]
                command += ["--threads", str(args.threads), "--contender", contender]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peaks[contender] = float(done.stdout.split()[-1])
                ratio = peaks[contender] / peaks["published"]
                print(
                    f"{name:<6}{dtype:<6}{contender:<11}{peaks[contender]:7.0f} MiB  {ratio:5.2f}"
                )


def peak_memory(args: argparse.Namespace) -> float:
    """MiB that three steps of one contender needed."""
    setting = Setting(DTYPES[args.dtype[0]], args.device, args.batch)
    if args.device == "cuda":
        work = make(args.only[0], setting, args.contender).contenders[args.contender]
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            work()
        return torch.cuda.max_memory_allocated() / 2**20
    small = Setting(setting.dtype, batch=2)  # loads every library that the steps need
    make(args.only[0], small, args.contender).contenders[args.contender]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = make(args.only[0], setting, args.contender).contenders[args.contender]
    for _ in range(3):
        work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def show_growth(args: argparse.Namespace, clock: Clock) -> None:
    """Forward and backward of a classifier, equal lengths; width 192, 6 layers."""
    model = RoMAForClassification(
        RoMAForClassificationConfig(
            encoder_config=EncoderConfig(d_model=192, nhead=3, depth=6),
            tubelet_size=(1, 1, 1),
            n_channels=2,
            n_pos_dims=1,
            dim_output=5,
        )
    ).to(args.device)
    print(f"{'series':>7} {'length':>7} {'ms':>8} {'tokens/s':>9}")
    shapes = [(max(1, 8192 // n), n) for n in (32, 128, 512, 2048, 8192)]
    for batch, length in [*shapes, (1, 128), (4, 128), (16, 128), (256, 128)]:
        values = torch.randn(batch, length, 2, 1, 1, device=args.device)
        positions = torch.rand(batch, 1, length, device=args.device) * length
        packed, _, _ = model.pack(values, positions, None)

        def step(packed=packed) -> None:
            with Setting(DTYPES[args.dtype[0]], args.device).amp():
                logits, _ = model(packed)
            logits.float().sum().backward()

        seconds = clock.interleaved({"step": step}, args.repeats)["step"].median
        tokens = batch * length
        print(f"{batch:7} {length:7} {seconds * 1e3:8.1f} {tokens / seconds:9,.0f}", flush=True)


if __name__ == "__main__":
    main()
