"""Exported programs: the same outputs, without this project."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.core.model.small_models import classifier, new_classifier, padded_batch, small_batch


@pytest.mark.parametrize(("use_cls", "neighbours"), [(True, 0), (False, 0), (True, 2)])
def test_exported_program_agrees_at_other_shapes(use_cls, neighbours):
    model = classifier(use_cls=use_cls, neighbours=neighbours)
    program = model.export().module()
    for lengths in ([3], [6, 2, 1], [1], [1, 1]):
        values, positions, pad_mask = padded_batch(lengths, max(lengths))
        with torch.no_grad():
            expected, _ = model(values, positions, pad_mask)
            logits = program(values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


LOAD_ELSEWHERE = """
import sys
sys.modules["roma_core"] = None  # importing it is an error from here on
import torch
program = torch.export.load(sys.argv[1])
spaces = {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}
spaces -= {f"<built-in function {name}>" for name in ("getitem", "add", "sub", "mul")}
assert spaces == {"aten"}, spaces
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(program.module()(*inputs), sys.argv[3])
"""


def test_exported_program_needs_nothing_of_this_project(tmp_path):
    model = classifier(neighbours=2)
    torch.export.save(model.export(), tmp_path / "model.pt2")
    values, positions, pad_mask = padded_batch([6, 2, 1], 6)
    inputs = (values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "logits.pt")]

    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *files], cwd=tmp_path, check=True)

    with torch.no_grad():
        expected, _ = model(values, positions, pad_mask)
    logits = torch.load(files[2], weights_only=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_head_on_every_token_agrees():
    model = new_classifier(pooling="token").eval()
    values, positions, pad_mask = small_batch([6, 2], 6)
    program = model.export().module()
    with torch.no_grad():
        logits = program(values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
        expected, _ = model(values, positions, pad_mask)
    torch.testing.assert_close(logits[~pad_mask], expected[~pad_mask], rtol=1e-5, atol=1e-5)
