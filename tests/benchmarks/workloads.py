"""The tasks that the models are timed on, each with its contenders; all compute the same thing.

    W1   pretraining step on images: 196 tokens of 768 numbers, 75 % hidden, 12 layers, decoder 2
    W2   pretraining step on irregular series: lengths log-uniform 10…500, 50 % hidden, 6 layers,
         decoder 2
    W2b  the same with batches of similar lengths, drawn from four times as many series
    W3   classification step on W2's series
    W4s  inference on W2's series
    W4i  inference on W1's images

Width 192, 3 heads, MLP 768, unless a setting says another width; fused AdamW for everybody.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roma_core.data.store import RaggedBatch
from roma_core.model.config import (
    EncoderConfig,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
)
from roma_core.model.masking import draw_mask
from roma_core.model.packing import PackedBatch, pack
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from tests.benchmarks.peers import TorchClassifier, hugging_face_mae
from tests.benchmarks.published import PublishedClassifier, PublishedPretraining, copy_blocks
from tests.benchmarks.timing import Work

STACK = EncoderConfig(d_model=192, nhead=3, depth=6)
IMAGE_STACK = EncoderConfig(d_model=192, nhead=3, depth=12)
DECODER = EncoderConfig(d_model=192, nhead=3, depth=2)
SERIES = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}
IMAGES = {"tubelet_size": (1, 16, 16), "n_channels": 3, "n_pos_dims": 2}
SERIES_CONFIG = RoMAForPreTrainingConfig(
    encoder_config=STACK, decoder_config=DECODER, mask_ratio=0.5, **SERIES
)
NAMES = ("W1", "W2", "W2b", "W3", "W4s", "W4i")


@dataclass(frozen=True)
class Setting:
    """Where and in which precision everybody runs."""

    dtype: torch.dtype
    device: str = "cpu"
    batch: int = 64
    compiled: bool = True
    compare: bool = True
    """Whether the contenders' numbers are compared first."""
    compile_published: bool = False
    graphs: bool = False
    """Whether ours is also captured as a CUDA graph, which replays this one batch's shapes."""
    width: int = 192
    """Of the encoder for series."""

    def amp(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not torch.float32)


@dataclass(frozen=True)
class Workload:
    """Contenders by name; ``flops`` are the useful ones: real tokens that somebody reads."""

    contenders: dict[str, Work]
    real_tokens: int
    padding_factor: float
    flops: float


def make(name: str, setting: Setting, only: str | None = None) -> Workload:
    """Build a workload; ``only`` leaves out the other contenders."""
    maker = {
        "W1": _pretrain_images,
        "W2": lambda s: _pretrain_series(s, n_batches=1),
        "W2b": lambda s: _pretrain_series(s, n_batches=4),
        "W3": lambda s: _classify_series(s, train=True),
        "W4s": lambda s: _classify_series(s, train=False),
        "W4i": _classify_images,
    }[name]
    if only is None:
        return maker(setting)
    workload = maker(replace(setting, compare=False))
    return replace(workload, contenders={only: workload.contenders[only]})


# --- data ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Padded:
    values: Tensor  # (B, L, 2, 1, 1)
    positions: Tensor  # (B, 1, L)
    pad_mask: Tensor  # (B, L)
    mask: Tensor  # (B, L), equally many per row, padding among them, as published
    packed: PackedBatch
    order: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.values.flatten(2)


def _lengths(n: int, seed: int = 0) -> np.ndarray:
    """Log-uniform 10…500, even, so that half of a series is a whole number."""
    return 2 * np.exp(np.random.default_rng(seed).uniform(np.log(5), np.log(250), n)).astype(int)


def _padded(lengths: np.ndarray, device: str) -> _Padded:
    n, longest = len(lengths), int(lengths.max())
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, longest, 2, 1, 1, generator=generator)
    positions = torch.rand(n, 1, longest, generator=generator).cumsum(2)
    pad_mask = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    packed, order, rows = pack(values, positions, pad_mask, SERIES_CONFIG)
    packed = draw_mask(packed, SERIES_CONFIG, 0, 0)
    mask = torch.zeros(n * longest, dtype=torch.bool)
    mask[rows[packed.masked.hidden_rows]] = True
    mask = mask.view(n, longest)
    most = int(mask.sum(1).max())
    for row in range(n):  # fill up with padding
        if missing := most - int(mask[row].sum()):
            mask[row, pad_mask[row].nonzero().flatten()[-missing:]] = True
    on_device = [x.to(device) for x in (values, positions, pad_mask, mask)]
    return _Padded(*on_device, packed.to(device), order.to(device))


class Curves:
    """Labelled series in memory, given many at once as a stored data set gives them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        rng, total = np.random.default_rng(0), sum(lengths)
        positions = rng.uniform(0, 1000, (total, 1)).astype(np.float32)
        values = rng.normal(size=(total, 2)).astype(np.float32)
        self.lengths = np.array(lengths)
        ids = np.arange(len(lengths))
        self.all = RaggedBatch(values, positions, self.lengths, ids, labels=ids % 5)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        one = self.gather(np.array([i]))
        return {"values": one.values[:, :, None, None], "positions": one.positions.T, "id": i}

    def gather(self, indices: np.ndarray) -> RaggedBatch:
        return self.all.reorder(indices)


def _images(setting: Setting) -> tuple[Tensor, Tensor]:
    """``(B, 1, 3, 224, 224)`` and a grid of positions ``(B, 2, 196)``."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(setting.batch, 1, 3, 224, 224, generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij"))
    positions = grid.flatten(1).expand(setting.batch, -1, -1).contiguous()
    return values.to(setting.device), positions.to(setting.device)


# --- contenders --------------------------------------------------------------------------------


Calls = list[Callable[[], Tensor]]


def _train(setting: Setting, model: nn.Module, losses: Calls) -> Work:
    model.to(setting.device).train()
    capturable = setting.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=capturable)

    def step() -> None:
        for loss_of in losses:
            optimizer.zero_grad(set_to_none=True)
            with setting.amp():
                loss = loss_of()
            loss.backward()
            optimizer.step()

    return step


def _infer(setting: Setting, model: nn.Module, outputs: Calls) -> Work:
    model.to(setting.device).eval()

    def run() -> None:
        with torch.inference_mode(), setting.amp():
            for output_of in outputs:
                output_of()

    return run


def _captured(work: Work) -> Work:
    """``work`` as one CUDA graph, captured when it is first called."""
    graph = None

    def run() -> None:
        nonlocal graph
        if graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # makes what is made once: indices, optimiser state
                    work()
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                work()
            graph = captured
        graph.replay()

    return run


def _contenders(
    setting: Setting,
    work: Callable[[Setting, nn.Module, Calls], Work],
    models: tuple[nn.Module, nn.Module, nn.Module],
    theirs_of: Callable[[nn.Module], Calls],
    ours_of: Callable[[nn.Module], Calls],
    peers: Mapping[str, tuple[nn.Module, Calls]],
) -> dict[str, Work]:
    """Each model's work by name; ``theirs_of`` and ``ours_of`` call a model on the batches."""
    theirs, ours, compiled = models
    contenders = {"published": work(setting, theirs, theirs_of(theirs))}
    if setting.compile_published:
        whole = torch.compile(copy.deepcopy(theirs))
        contenders["published, compiled"] = work(setting, whole, theirs_of(whole))
    for name, (model, calls) in peers.items():
        contenders[name] = work(setting, model, calls)
    contenders["ours"] = work(setting, ours, ours_of(ours))
    if setting.compiled:
        contenders["compiled"] = work(setting, compiled, ours_of(compiled))
    if setting.graphs:
        fastest = compiled if setting.compiled else ours
        contenders["graph"] = _captured(work(setting, fastest, ours_of(fastest)))
    return contenders


def _stack(setting: Setting, depth: int) -> EncoderConfig:
    """Heads 64 wide at 192, 72 at 432 and 720: multiples of 8, as fused kernels want them."""
    nhead = {192: 3, 432: 6, 720: 10}[setting.width]
    return EncoderConfig(d_model=setting.width, nhead=nhead, depth=depth)


def _models(setting: Setting, config: RoMAForPreTrainingConfig | RoMAForClassificationConfig):
    """The published model, ours, and ours with compiled regions: the same weights in each."""
    torch.manual_seed(0)
    pretrains = isinstance(config, RoMAForPreTrainingConfig)
    ours = RoMAForPreTraining(config) if pretrains else RoMAForClassification(config)
    compiled = type(ours)(config)
    compiled.load_state_dict(ours.state_dict())
    compiled.compile_regions()
    theirs = PublishedPretraining(ours) if pretrains else PublishedClassifier(ours)
    copy_blocks(ours.encoder, theirs.encoder, config.n_pos_dims)
    if pretrains:
        copy_blocks(ours.decoder, theirs.decoder, config.n_pos_dims)
    return theirs.to(setting.device), ours.to(setting.device), compiled.to(setting.device)


def _agree(setting: Setting, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    if setting.compare:
        with torch.no_grad():
            torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-4)


def _pretrain_series(setting: Setting, n_batches: int) -> Workload:
    lengths = np.sort(_lengths(setting.batch * n_batches))
    batches = [_padded(part, setting.device) for part in np.array_split(lengths, n_batches)]
    stack, decoder = _stack(setting, STACK.depth), _stack(setting, DECODER.depth)
    config = SERIES_CONFIG.model_copy(update={"encoder_config": stack, "decoder_config": decoder})
    models = theirs, ours, _ = _models(setting, config)
    first = batches[0]
    diluted = int(first.packed.masked.hidden.total) / int(first.mask.sum())
    _agree(
        setting,
        lambda: ours(first.packed)[1] * diluted,
        lambda: theirs(first.tokens, first.positions, first.pad_mask, first.mask),
    )
    contenders = _contenders(
        setting,
        _train,
        models,
        lambda m: [
            functools.partial(m, b.tokens, b.positions, b.pad_mask, b.mask) for b in batches
        ],
        lambda m: [lambda b=b: m(b.packed)[1] for b in batches],  # type: ignore[misc]
        {},
    )
    real = sum(b.packed.segments.total for b in batches)
    useful = 3 * sum(_pretraining_flops(stack, decoder, 2, b.packed) for b in batches)
    return Workload(contenders, real, sum(b.pad_mask.numel() for b in batches) / real, useful)


def _classify_series(setting: Setting, train: bool) -> Workload:
    batch = _padded(np.sort(_lengths(setting.batch)), setting.device)
    label = (torch.arange(setting.batch) % 5).to(setting.device)
    stack = _stack(setting, STACK.depth)
    config = RoMAForClassificationConfig(encoder_config=stack, dim_output=5, **SERIES)
    models = theirs, ours, _ = _models(setting, config)
    torch_model = TorchClassifier(stack, 2, 1, 5)
    arguments = (batch.tokens, batch.positions, batch.pad_mask)
    _agree(setting, lambda: ours(batch.packed)[0], lambda: theirs(*arguments)[batch.order])

    def output(logits_of: Callable[[], Tensor]) -> Calls:
        if not train:
            return [logits_of]
        return [lambda: torch.nn.functional.cross_entropy(logits_of().float(), label)]

    contenders = _contenders(
        setting,
        _train if train else _infer,
        models,
        lambda m: output(lambda: m(*arguments)),
        lambda m: output(lambda: m(batch.packed)[0]),
        {"torch": (torch_model, output(lambda: torch_model(*arguments)))},
    )
    real = batch.packed.segments.total
    useful = _classification_flops(stack, 2, batch.packed) * (3 if train else 1)
    return Workload(contenders, real, batch.pad_mask.numel() / real, useful)


def _pretrain_images(setting: Setting) -> Workload:
    values, positions = _images(setting)
    config = RoMAForPreTrainingConfig(
        encoder_config=IMAGE_STACK, decoder_config=DECODER, mask_ratio=0.75, **IMAGES
    )
    models = theirs, ours, _ = _models(setting, config)
    packed, _, _ = ours.pack(values, positions, None)
    packed = draw_mask(packed, config, 0, 0)
    mask = torch.zeros(setting.batch * 196, dtype=torch.bool, device=setting.device)
    mask[packed.masked.hidden_rows] = True
    mask = mask.view(setting.batch, 196)
    tokens = packed.tokens.view(setting.batch, 196, -1)
    _agree(setting, lambda: ours(packed)[1], lambda: theirs(tokens, positions, None, mask))
    peers = {}
    if (peer := hugging_face_mae(IMAGE_STACK, DECODER)) is not None:
        pixels = values[:, 0]
        peers["ViTMAE"] = (peer, [lambda: peer(pixels).loss])
    contenders = _contenders(
        setting,
        _train,
        models,
        lambda m: [functools.partial(m, tokens, positions, None, mask)],
        lambda m: [lambda: m(packed)[1]],
        peers,
    )
    useful = 3 * _pretraining_flops(IMAGE_STACK, DECODER, 768, packed)
    return Workload(contenders, packed.segments.total, 1.0, useful)


def _classify_images(setting: Setting) -> Workload:
    values, positions = _images(setting)
    config = RoMAForClassificationConfig(encoder_config=IMAGE_STACK, dim_output=5, **IMAGES)
    models = theirs, ours, _ = _models(setting, config)
    packed, _, _ = ours.pack(values, positions, None)
    tokens = packed.tokens.view(setting.batch, 196, -1)
    _agree(setting, lambda: ours(packed)[0], lambda: theirs(tokens, positions, None))
    peers = {}
    if (peer := hugging_face_mae(IMAGE_STACK, DECODER)) is not None:
        peer.config.mask_ratio = 0.0
        pixels = values[:, 0]
        encoder = peer.vit
        peers["ViTMAE"] = (encoder, [lambda: encoder(pixels).last_hidden_state])
    contenders = _contenders(
        setting,
        _infer,
        models,
        lambda m: [functools.partial(m, tokens, positions, None)],
        lambda m: [lambda: m(packed)[0]],
        peers,
    )
    useful = _classification_flops(IMAGE_STACK, 768, packed)
    return Workload(contenders, packed.segments.total, 1.0, useful)


# --- useful work -------------------------------------------------------------------------------


def _stack_flops(c: EncoderConfig, lengths: np.ndarray, read: np.ndarray) -> float:
    """Forward FLOPs of a stack over series of ``lengths``, of whose last block ``read`` rows are used."""
    width, n = c.nhead * c.head_width, float(lengths.sum())
    row = 2 * c.d_model * 4 * width + 4 * c.d_model * c.mlp_width
    full = n * row + 4 * width * float((lengths**2).sum())
    kv = 2 * c.d_model * 2 * width
    last = n * kv + float(read.sum()) * (row - kv) + 4 * width * float((lengths * read).sum())
    return (c.depth - 1) * full + last


def _pretraining_flops(
    c: EncoderConfig, decoder: EncoderConfig, width: int, batch: PackedBatch
) -> float:
    assert batch.masked is not None
    lengths, hidden = np.array(batch.segments.lengths), np.array(batch.masked.hidden.lengths)
    visible = lengths - hidden + 1
    edges = 2 * visible.sum() * (width * c.d_model + c.d_model * decoder.d_model)
    head = 2 * hidden.sum() * width * decoder.d_model
    encoder = _stack_flops(c, visible, visible)
    return encoder + _stack_flops(decoder, lengths + 1, hidden) + float(edges + head)


def _classification_flops(c: EncoderConfig, width: int, batch: PackedBatch) -> float:
    lengths = np.array(batch.segments.lengths) + 1
    edges = 2 * float(lengths.sum()) * width * c.d_model
    return _stack_flops(c, lengths, np.ones_like(lengths)) + edges
