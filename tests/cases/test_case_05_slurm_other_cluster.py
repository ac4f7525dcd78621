"""Options that send jobs to another cluster, where they would be lost, are refused."""

import pytest

from roma_pipelines.launching.slurm.profile import SlurmProfile, SlurmSettings


@pytest.mark.parametrize("option", ["--clusters=other", "--cluster=other", "--clus=other"])
def test_another_cluster_is_refused_with_the_way_to_it(tmp_path, option):
    (tmp_path / "two.yaml").write_text(f"sbatch_options: ['{option}']\n")

    with pytest.raises(ValueError, match=r"two\.yaml.*must not set clus.*profile of that one"):
        SlurmProfile.load("two", SlurmSettings(profiles=tmp_path))


@pytest.mark.parametrize(
    "option",
    ["--test-only", "--parsable", "--wait", "--wrap=true", "--array=1-3", "--arr=1-3", "--job=x"],
)
def test_options_that_change_what_is_submitted_or_answered_are_refused(option):
    with pytest.raises(ValueError, match="must not set"):
        SlurmProfile(name="two", sbatch_options=(option,))


@pytest.mark.parametrize(
    "option", ["--mail-type=END", "--nodelist=n1", "--wait-all-nodes=1", "--cluster-constraint=x"]
)
def test_other_options_are_the_sites(option):
    assert SlurmProfile(name="two", sbatch_options=(option,)).sbatch_options == (option,)
