"""What the thin client refuses before it asks a server."""

from decimal import Decimal

import pytest

from roma_core.serving.client import RequestRejected, ServedModel
from tests.core.serving import toy


def test_what_is_no_number_is_refused_by_the_name_of_its_field():
    rows = [toy.series(2, seed=1), toy.series(2, seed=2)]
    rows[1].values["flux"][1] = Decimal("1.5")
    with pytest.raises(
        RequestRejected, match=r"series 1: values: 'flux': .*Decimal.*plain numbers"
    ):
        ServedModel("http://127.0.0.1:9", timeout_s=2).predict(rows)
