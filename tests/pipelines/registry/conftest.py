import pytest

from roma_pipelines.registry.store import MlflowSettings, connect


@pytest.fixture
def client(store_root):
    return connect(MlflowSettings.from_values({}), store_root)
