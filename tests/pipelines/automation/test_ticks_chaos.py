"""Sensors tick for months: memory stays flat. ``make chaos``."""

import gc

import dagster as dg
import psutil
import pytest

from roma_pipelines.automation.alerts import alert_on_failure
from roma_pipelines.automation.sensors import check_dataset, check_source

TICKS, WARM_UP = 10_000, 1_000
MOST_MB = 10.0


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_ten_thousand_ticks(month):
    month.deliver()
    month.receive_inputs()
    settings = month.experiment.automation.new_data
    month.launch(check_source(month.experiment, settings, month.instance, month.now), "new")
    month.launch(check_dataset(month.experiment, month.instance), "train")
    definitions = month.experiment.with_automation(month.assets)
    merged = dg.Definitions.merge(definitions, dg.Definitions(sensors=[alert_on_failure]))
    repository = merged.get_repository_def()
    cursors = {}
    sensors = list(repository.sensor_defs)
    rss = {}
    for tick in range(TICKS + 1):
        sensor = sensors[tick % len(sensors)]
        context = dg.build_sensor_context(
            instance=month.instance,
            repository_def=repository,
            cursor=cursors.get(sensor.name),
        )
        cursors[sensor.name] = sensor.evaluate_tick(context).cursor
        if tick in (WARM_UP, TICKS):
            gc.collect()
            rss[tick] = psutil.Process().memory_info().rss / 1e6
        if tick % 1000 == 0:
            print(f"tick {tick}: {psutil.Process().memory_info().rss / 1e6:.1f} MB")
    grown = rss[TICKS] - rss[WARM_UP]
    print(f"{grown:+.1f} MB over {TICKS - WARM_UP} ticks")
    assert grown < MOST_MB
