"""The verbs of the backend against an API server over HTTP."""

import pytest

from roma_pipelines.launching.job import JobFailed
from roma_pipelines.launching.supervisor import supervise

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.05}


def test_a_job_runs_to_its_end(launcher, cluster, folder, make_spec, starts):
    outcome = supervise(launcher, folder, make_spec("print('hello')\nsucceed()"), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert folder.attempt(1).log.read_text() == "hello\n"
    assert outcome.attempts[0].end.nodes == "n1"
    assert outcome.attempts[0].external["name"] == "roma-0123456789ab-1"


def test_two_nodes_meet(launcher, cluster, folder, make_spec, starts):
    body = (
        "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "if dist.get_rank() == 0: succeed(world_size=dist.get_world_size())\n"
        "print('rank', dist.get_rank()); dist.destroy_process_group()"
    )
    spec = make_spec(body, starter="torchrun", nodes=2, processes_per_node=2)

    outcome = supervise(launcher, folder, spec, CONFIG, **FAST)

    assert outcome.status == "completed"
    assert sorted(starts()) == [1, 1, 1, 1]
    assert outcome.attempts[0].end.nodes == "n1, n2"
    assert "rank 0" in folder.attempt(1).log.read_text()


def test_a_failure_has_the_end_of_the_log(launcher, cluster, folder, make_spec):
    with pytest.raises(JobFailed, match="exit code 3") as caught:
        supervise(launcher, folder, make_spec("print('why')\nsys.exit(3)"), CONFIG, **FAST)

    assert "why" in str(caught.value)
    assert caught.value.outcome.status == "failed"
