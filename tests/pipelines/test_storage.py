"""A storage root of another layout is refused with the way out, and left as it is."""

import pytest

from roma_core.files import read_json, write_json
from roma_pipelines.storage import LAYOUT_VERSION, Storage, StorageError


@pytest.mark.parametrize("version", [0, LAYOUT_VERSION - 1, 99, "1", None])
def test_another_layout_is_refused_and_left_alone(tmp_path, version):
    Storage.open(tmp_path)
    write_json(tmp_path / "layout.json", {"schema_version": version})

    with pytest.raises(StorageError, match=r"written by another version .*move it away"):
        Storage.open(tmp_path)

    assert read_json(tmp_path / "layout.json") == {"schema_version": version}
