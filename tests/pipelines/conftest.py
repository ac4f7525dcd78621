"""One PostgreSQL for all tests that need one; each makes a database of its own."""

from collections.abc import Iterator

import pytest

from tests.pipelines.real_postgres import Postgres, real_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with real_postgres() as server:
        yield server
