import pytest

from roma_core.evaluation.compare import compare_predictions
from roma_core.evaluation.predictions import PredictionTable


def test_tables_of_other_series_are_not_compared(simulated):
    ours = simulated(n=50, k=3)
    other = PredictionTable(
        ours.ids, ours.classes, (ours.labels + 1) % 3, ours.probabilities, ours.lengths
    )
    with pytest.raises(ValueError, match="other labels"):
        compare_predictions(ours, other)
    with pytest.raises(ValueError, match="other series or classes"):
        compare_predictions(ours, simulated(n=51, k=3))
