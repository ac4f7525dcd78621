"""Tables of a report and a model card: what is known of the data, the model and its trainings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roma_core.data.schema import Manifest
from roma_core.evaluation.facts import Fact, FactSheet
from roma_core.files import read_json
from roma_pipelines.provenance import code_version


def report_facts(
    manifest: Manifest, encoder: Mapping[str, Any], classifier: Mapping[str, Any], dagster_run: str
) -> tuple[FactSheet, ...]:
    """Tables of the report: data, model, training, lineage."""
    model = read_json(Path(classifier["weights"]) / "model_config.json")
    stack = model["encoder_config"]
    counts = manifest.counts
    dropped = manifest.irregularity

    def sheet(title: str, **facts: Any) -> FactSheet:
        return FactSheet(
            title=title,
            facts=tuple(
                Fact(
                    label=label.replace("_", " "),
                    value=f"{value:.4g}" if isinstance(value, float) else str(value),
                    monospace=label in ("version", "code", "Dagster_run", "MLflow_run"),
                )
                for label, value in facts.items()
            ),
        )

    return (
        sheet(
            "Data",
            name=manifest.name,
            version=manifest.digest[:16],
            series=", ".join(f"{split} {counts[split].n_series}" for split in counts),
            observations_dropped=f"{dropped.n_dropped} of {dropped.n_observations_before}"
            if dropped
            else "none",
            split=manifest.split_rule,
            citation=manifest.provenance.citation,
            licence=manifest.provenance.licence,
        ),
        sheet(
            "Model",
            parameters=f"{classifier['parameters']:,}",
            encoder=f"width {stack['d_model']}, {stack['depth']} layers, {stack['nhead']} heads",
            positions=f"{model['n_pos_dims']} axis, p = {model['p_rope_val']}",
        ),
        sheet(
            "Training",
            pretraining=f"{encoder['training_s']:.1f} s, validation loss {encoder['eval/loss']:.4f}",
            finetuning=f"{classifier['training_s']:.1f} s, validation loss {classifier['eval/loss']:.4f}",
            processes=classifier["processes"],
            device=classifier["device"],
        ),
        sheet(
            "Lineage",
            code=code_version(),
            Dagster_run=dagster_run,
            MLflow_run=classifier["mlflow_run_id"],
        ),
    )
