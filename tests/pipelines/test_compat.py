"""Private parts of Dagster and Optuna that we use still exist and behave as ``_compat`` expects."""

import dagster as dg

from roma_pipelines._compat import SerializableErrorInfo, adopted_trial, shared_instance


def test_a_tick_without_an_instance_gets_one_from_its_reference(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        context = dg.SensorEvaluationContext(instance_ref=instance.get_ref())
        assert context._instance is None

        opened = shared_instance(context)

        assert context.instance is opened
        assert opened.root_directory == instance.root_directory


def test_errors_of_steps_have_a_message_a_class_and_a_cause():
    assert {"message", "cls_name", "cause"} <= set(SerializableErrorInfo._fields)


def test_a_trial_of_another_process_keeps_its_values_and_reports():
    import optuna

    study = optuna.create_study()
    asked = study.ask()
    rate = asked.suggest_float("rate", 0, 1)
    asked.set_user_attr("pruned", True)

    trial = adopted_trial(study, asked.number)
    trial.report(0.5, 0)

    assert trial.suggest_float("rate", 0, 1) == rate
    assert trial.user_attrs == {"pruned": True}
    assert study.trials[0].intermediate_values == {0: 0.5}
