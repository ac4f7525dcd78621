"""Speed and memory of the models beside the published formulation, interleaved in one process.

    python -m tests.benchmarks.model [--repeats 5] [--threads 1] [--batch 64]

    W2   pretraining step on irregular series: lengths log-uniform 10…500, width 192, 6 layers,
         3 heads, 50 % hidden, decoder 2 layers
    W3   classification step on the same lengths
    W4s  inference on the same lengths

Prints medians and ratios, the padding factor they come from, and the share of the matmul rate that
this computer reached in the same minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from roma_core.model.classification import RoMAForClassification
from roma_core.model.config import (
    EncoderConfig,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
)
from roma_core.model.masking import sample_hidden
from roma_core.model.packing import PackedBatch, pack
from roma_core.model.pretraining import RoMAForPreTraining
from tests.benchmarks.published import (
    PublishedClassifier,
    PublishedPretraining,
    copy_blocks,
)

STACK = EncoderConfig(d_model=192, nhead=3, depth=6)
DECODER = EncoderConfig(d_model=192, nhead=3, depth=2)
SHAPE = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}


def batch_of(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """values ``(n, L, 2, 1, 1)``, positions ``(n, 1, L)``, pad_mask ``(n, L)``; even lengths."""
    rng = np.random.default_rng(seed)
    lengths = 2 * np.exp(rng.uniform(np.log(5), np.log(250), n)).astype(int)
    longest = int(lengths.max())
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, longest, 2, 1, 1, generator=generator)
    positions = torch.rand(n, 1, longest, generator=generator).cumsum(2)
    pad_mask = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return values, positions, pad_mask


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of the size that a block computes."""
    a, b = torch.randn(4096, 192).to(dtype), torch.randn(192, 768).to(dtype)
    best = min(timed(lambda: a @ b) for _ in range(20))
    return 2 * 4096 * 192 * 768 / best


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(
    a: Callable[[], object], b: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Median seconds of both, A B A B …, after one warm-up each."""
    a(), b()
    pairs = [(timed(a), timed(b)) for _ in range(repeats)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def flops(packed: PackedBatch, queries: float, train: bool) -> float:
    """Useful FLOPs of one pass of the 6-layer encoder over real tokens; backward counts twice."""
    tokens, lengths = packed.segments.total, np.array(packed.segments.lengths)
    linear = 2 * tokens * (4 * 192 * 192 + 2 * 192 * 768) * STACK.depth
    attention = 4 * float((lengths**2).sum()) * 192 * STACK.depth
    return (linear + attention) * (3 if train else 1) * queries


def published_mask(packed: PackedBatch, hidden: Tensor, rows: Tensor, pad_mask: Tensor) -> Tensor:
    """Our hidden tokens, filled up with padding so that every row hides equally many."""
    mask = torch.zeros_like(pad_mask).flatten()
    mask[rows[hidden]] = True
    mask = mask.view_as(pad_mask)
    most = int(mask.sum(1).max())
    for row in range(len(mask)):
        missing = most - int(mask[row].sum())
        if missing:
            padding = pad_mask[row].nonzero().flatten()
            mask[row, padding[len(padding) - missing :]] = True
    return mask


def train_step(
    loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    values, positions, pad_mask = batch_of(arguments.batch)
    packed, order, rows = pack(values, positions, pad_mask, (1, 1, 1), 2, 1)
    tokens = values.flatten(2)
    real = packed.segments.total
    print(
        f"{arguments.threads} thread(s), {arguments.batch} series, {real} real tokens, "
        f"padding factor {pad_mask.numel() / real:.2f}, torch {torch.__version__}"
    )
    hidden = sample_hidden(packed.segments, packed.sample_ids, Fraction(1, 2), "random", 0, 0)
    masked = packed.with_mask(hidden)
    mask = published_mask(packed, hidden, rows, pad_mask)
    label = torch.arange(arguments.batch) % 5
    labelled = PackedBatch(
        packed.tokens, packed.positions, packed.segments, packed.sample_ids, labels=label[order]
    )

    torch.manual_seed(0)
    auto = RoMAForPreTraining(
        RoMAForPreTrainingConfig(encoder_config=STACK, decoder_config=DECODER, **SHAPE)
    )
    theirs = PublishedPretraining(auto)
    copy_blocks(auto.encoder, theirs.encoder, 1)
    copy_blocks(auto.decoder, theirs.decoder, 1)
    classifier = RoMAForClassification(
        RoMAForClassificationConfig(encoder_config=STACK, dim_output=5, **SHAPE)
    )
    their_classifier = PublishedClassifier(classifier)
    copy_blocks(classifier.encoder, their_classifier.encoder, 1)

    with torch.no_grad():
        ours_loss = float(auto(masked)[1]) * int(masked.masked.hidden.total) / int(mask.sum())
        assert abs(ours_loss - float(theirs(tokens, positions, pad_mask, mask))) < 1e-4
        ours_logits = classifier(packed)[0]
        torch.testing.assert_close(
            ours_logits, their_classifier(tokens, positions, pad_mask)[order], rtol=1e-4, atol=1e-5
        )

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def cross_entropy(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, label)

    print("workload  dtype  published ms  ours ms  ratio  real tokens/s  share of matmul rate")
    for dtype in (torch.float32, torch.bfloat16):
        amp = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
        rate = matmul_rate(dtype)

        def under(work: Callable[[], Tensor], amp: torch.autocast = amp) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with amp:
                    return work()

            return run

        inference = torch.inference_mode()
        workloads = {
            "W2": (
                train_step(
                    under(lambda: theirs(tokens, positions, pad_mask, mask)), optimizer(theirs)
                ),
                train_step(under(lambda: auto(masked)[1]), optimizer(auto)),
                None,
            ),
            "W3": (
                train_step(
                    under(lambda: cross_entropy(their_classifier(tokens, positions, pad_mask))),
                    optimizer(their_classifier),
                ),
                train_step(under(lambda: classifier(labelled)[1]), optimizer(classifier)),
                flops(packed, 1.0, train=True),
            ),
            "W4s": (
                inference(under(lambda: their_classifier(tokens, positions, pad_mask))),
                inference(under(lambda: classifier(packed)[0])),
                flops(packed, 1.0, train=False),
            ),
        }
        for name, (a, b, useful) in workloads.items():
            published_s, ours_s = interleaved(a, b, arguments.repeats)
            share = f"{useful / ours_s / rate:.0%}" if useful else "–"
            print(
                f"{name:<8}  {str(dtype)[6:]:<8} {published_s * 1e3:9.0f}  {ours_s * 1e3:9.0f}  "
                f"{published_s / ours_s:5.2f}  {real / ours_s:13,.0f}  {share:>8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
