"""What stands for the files of a source, and what does not disturb it."""

from roma_core.data.config import fingerprint_of


def test_links_to_nothing_are_passed_over(tmp_path):
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "inner" / "a.ts").write_text("a")
    patterns = [tmp_path / "data", tmp_path / "*.ts"]
    before = fingerprint_of(patterns)
    assert before.n_files == 1
    (tmp_path / "data" / "gone.ts").symlink_to(tmp_path / "nowhere")
    (tmp_path / "gone.ts").symlink_to(tmp_path / "nowhere")
    assert fingerprint_of(patterns) == before
    (tmp_path / "b.ts").write_text("b")
    assert fingerprint_of(patterns).n_files == 2
