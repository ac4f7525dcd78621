"""FSDP2: a sharded training equals an unsharded one, and each resumes from the other's checkpoints."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from roma_core import RoMAForClassification, Trainer, TrainerConfig
from roma_core.trainer.checkpoint import load_best, load_newest
from tests.core.trainer.training_runs import (
    Plan,
    autoencoder_of_windows,
    classifier,
    config,
    interrupt,
    plain_autoencoder,
    points,
    records_reach,
    run,
    weights,
)

# 41 series in steps of 14, 14 and 13; of the last, one process has 4 micro-batches and the other 3
CHANGES = {
    "batch_size": 2,
    "gradient_accumulation_steps": 5,
    "epochs": 7,
    "save_every": 4,
    "eval_every": 6,
    "ema_decay": 0.9,
    "gradient_clip": 0.05,
    "optimizer_args": {"weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two processes, each with the whole model."""
    folder = tmp_path_factory.mktemp("whole")
    run(Plan(folder, CHANGES, plain_autoencoder), 2)
    return folder


def assert_equal(found, expected) -> None:
    """Weights, their average, the optimiser's state and every metric, up to rounding in float64."""
    ours, theirs = (load_newest(f / "checkpoints") for f in (found, expected))
    assert ours is not None and theirs is not None and ours.state.step == theirs.state.step
    for kind in ("model", "optimizer", "ema"):
        tensors, again = ours.tensors[kind], theirs.tensors[kind]
        assert tensors.keys() == again.keys() != set()
        for name in tensors:
            torch.testing.assert_close(tensors[name], again[name], rtol=1e-9, atol=1e-12)
    assert [p[:2] for p in points(found)] == [p[:2] for p in points(expected)]
    values = [[v for *_, v in points(folder)] for folder in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_a_sharded_model_learns_what_a_whole_one_does(tmp_path, whole):
    output = run(Plan(tmp_path, CHANGES | {"sharding": "fsdp"}, plain_autoencoder), 2)
    assert "2 process(es) (sharded)" in output
    assert_equal(tmp_path, whole)
    norms = [value for name, _, value in points(tmp_path) if name == "train/grad_norm"]
    assert min(norms) > CHANGES["gradient_clip"]  # clipping had something to do


def test_sharded_and_whole_go_on_from_each_others_checkpoints(tmp_path, whole):
    """Sharded over 2 → killed → whole in 1 → stopped → sharded over 2."""
    sharded = Plan(tmp_path, CHANGES | {"sharding": "fsdp"}, plain_autoencoder)
    alone = Plan(tmp_path, CHANGES, plain_autoencoder)
    interrupt(sharded, records_reach(tmp_path, 6), signal.SIGKILL, 2)
    stopped = interrupt(alone, records_reach(tmp_path, 12), signal.SIGTERM)
    assert "resumed from" in stopped.output and "asked to stop (SIGTERM)" in stopped.output
    assert "resumed from" in run(sharded, 2)
    assert_equal(tmp_path, whole)


def test_running_statistics_are_those_of_rank_0_whole_and_sharded(tmp_path):
    changes = CHANGES | {"epochs": 3}
    whole = Plan(tmp_path / "whole", changes, autoencoder_of_windows)
    sharded = Plan(tmp_path / "sharded", changes | {"sharding": "fsdp"}, autoencoder_of_windows)
    run(whole, 2)
    run(sharded, 2)
    assert_equal(sharded.folder, whole.folder)
    newest = load_newest(whole.folder / "checkpoints")
    assert newest is not None and newest.tensors["ema"]["stem.norms.1.mean"].any()


def test_sgd_shards_without_its_fused_kernel(tmp_path):
    with pytest.raises(ValueError, match="leave fused out of optimizer_args"):
        config(tmp_path, sharding="fsdp", optimizer="sgd", optimizer_args={"fused": True})


def _keep_what_comes_out(trainer: Trainer) -> None:
    def keep(model: RoMAForClassification, folder, device) -> None:
        save_file(model.state_dict(), folder / "out.safetensors")

    trainer.set_post_train_hook(keep)


def test_a_sharded_probe_ends_early_and_gives_its_best_weights_whole(tmp_path):
    changes = {"sharding": "fsdp", "freeze_encoder": True, "final_weights": "best", "epochs": 40}
    changes |= {"batch_size": 4, "eval_every": 2, "best_metric": "eval/accuracy", "base_lr": 0.05}
    changes |= {"best_metric_mode": "max", "early_stopping_patience": 3, "optimizer": "sgd"}
    output = run(Plan(tmp_path, changes, classifier, prepare=_keep_what_comes_out), 2)
    assert "early stopping" in output and "the best, are kept" in output
    checkpoints = tmp_path / "checkpoints"
    best = load_best(TrainerConfig(checkpoint_dir=checkpoints, **changes))
    assert best is not None and best.state.step < weights(tmp_path)[0].step
    out, start = load_file(checkpoints / "out.safetensors"), classifier().state_dict()
    for name, tensor in best.tensors["model"].items():
        assert torch.equal(out[name], tensor)
        assert torch.equal(tensor, start[name]) != name.startswith("head.")
