"""Asset: a hyperparameter search, whose trials are jobs."""

from pathlib import Path

import dagster as dg

from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.pipes import on_interrupt
from roma_pipelines.pictures import picture
from roma_pipelines.registry import runs, store
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import page_links, upstream_metadata
from roma_pipelines.tuning import Search, TuningError


def tuning_study_asset(experiment: Experiment) -> dg.AssetsDefinition:
    """The asset ``tuning_study``; each materialisation continues the study up to its budget."""

    @dg.asset(
        **experiment.asset_arguments("tuning_study"),
        kinds={"optuna"},
        description=f"Hyperparameter search on the validation split. {experiment.description}",
    )
    def tuning_study(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        (data,) = upstream_metadata(context, experiment, "dataset")
        dataset, storage = Path(data["path"]), Storage.open()

        def launcher(target: str, profile: str | None) -> Launcher:
            return getattr(context.resources, target).launcher(profile)

        try:
            search = Search(experiment, dataset, storage, context.log.info, launcher)
            search.holder = {"dagster_run_id": context.run_id}
            search.on_interrupt = lambda error: on_interrupt(context.instance, context.run)
            found = search.run()
        except (TuningError, store.StoreError, ValueError) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        uri = store.tracking_uri(store.MlflowSettings(), storage.mlflow)
        links = page_links(search.folder.path.name, True, runs.known_run(search.folder), uri)
        links.pop("open_log", None)
        rows = [list(found.rows[0]), ["---"] * len(found.rows[0])]
        rows += [list(row.values()) for row in found.rows]
        table = "\n".join(
            f"| {' | '.join(str(c).replace('|', '/') for c in row)} |" for row in rows
        )
        return dg.MaterializeResult(
            metadata={
                "history": picture(found.history, "history of the study"),
                "result": found.text,
                "best_value": found.best.value,
                "better_settings": dg.MetadataValue.json(found.settings),
                "trials": dg.MetadataValue.md(table),
                "study": search.name,
                "hours": search.hours,
                "report": dg.MetadataValue.path(str(found.page)),
                **links,
            }
        )

    return tuning_study
