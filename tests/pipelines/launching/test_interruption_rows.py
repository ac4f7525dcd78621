"""Which test holds which promise about interruptions and bad input; none may lose its test unseen.

Only names are compared: that a test is there, not what it asserts. The tests themselves do that.

That no process, no temporary file and no file of the project is left behind is asserted after every
test of this folder, by its ``conftest.py``; that no daemon is, after the last one.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]

INTERRUPTIONS = {
    "Terminate in the UI": ["orchestrator: terminate_ends_the_job"],
    "worker killed with -9": [
        "orchestrator: a_worker_killed_with_9_is_followed_by_a_retry_that_adopts",
        "slurm/interruptions: a_worker_killed_with_9_is_followed_by_one_that_adopts",
        "supervisor: a_killed_supervisor_leaves_the_job_to_the_next_one",
    ],
    "orchestrator restarted": [
        "orchestrator: an_orchestrator_that_goes_and_comes_leaves_the_job_alone"
    ],
    "orchestrator killed at a fault point": [
        "supervisor: a_supervisor_that_dies_anywhere_is_followed_by_one_that_goes_on",
        "supervisor: the_same_between_two_attempts",
        "slurm/interruptions: a_supervisor_may_die_at_any_point",
        "chaos: one_job_one_run_one_version_wherever_it_was_killed",
        "chaos: one_of_each_after_a_kill_at_every_point_in_turn",
    ],
    "demo killed with -9": ["pipelines/cli/test_demo.py: the_training_of_a_killed_demo_is_adopted"],
    "Ctrl-C": [
        "commands: ctrl_c_ends_the_watch_and_a_stop_request_continues_the_job",
        "dagster: ctrl_c_in_a_foreground_run_ends_the_job",
    ],
    "scancel from outside": [
        "slurm/interruptions: scancel_by_another_user_ends_it",
        "slurm/interruptions: scancel_in_the_queue_ends_it",
    ],
    "preemption": ["slurm/interruptions: a_preempted_job_continues"],
    "TIMEOUT": [
        "slurm/interruptions: the_time_limit_continues_the_job",
        "slurm/interruptions: the_signal_before_the_limit_lets_the_job_save",
        "deploy/test_run_experiment.py: before_the_limit_it_saves_requeues_and_goes_on",
    ],
    "node failure": ["slurm/interruptions: a_job_whose_node_fails_continues"],
    "a process outlives a lost one and reports a failure": [
        "outcome: the_failure_of_a_process_that_lost_another_one_is_no_cause",
        "local: a_job_continues_whose_rank_was_killed",
        "slurm/interruptions: a_node_is_lost_and_a_survivor_reports_a_failure_before_slurm_does",
    ],
    "cancelled while the cluster is away": [
        "fake: cancelling_is_bounded_while_the_target_is_away_and_done_once_it_is_back",
        "slurm/interruptions: cancelling_while_slurmctld_is_away_is_bounded_and_kept_for_later",
    ],
    "a call of the target that blocks for longer than a lease lasts": [
        "fake: a_lease_is_renewed_during_a_call_that_blocks_but_not_by_a_stuck_one"
    ],
    "many interruptions in a row": [
        "outcome: attempts_that_advance_are_not_counted_and_a_deliberate_retry_starts_anew",
        "supervisor: attempts_that_advance_have_no_bound",
    ],
    "node lost mid-step": ["slurm/interruptions: a_node_that_is_lost_mid_step_is_found_out"],
    "out of memory": ["slurm/interruptions: out_of_memory_fails_and_says_so"],
    "slurmctld away for a minute": [
        "slurm/interruptions: slurmctld_may_be_away",
        "slurm/interruptions: slurmctld_may_be_away_for_a_minute_while_the_job_ends",
    ],
    "sbatch times out after accepting": [
        "slurm/interruptions: sbatch_that_times_out_after_accepting_is_not_repeated",
        "slurm/interruptions: sbatch_that_times_out_without_accepting_is_repeated",
        "slurm/interruptions: a_job_accepted_twice_runs_once",
    ],
    "sacct absent, late or wrong": [
        "slurm/interruptions: a_job_that_slurm_forgot_ends_as_its_files_report",
        "slurm/interruptions: a_running_job_that_slurmctld_lost_is_not_doubled",
        "slurm/interruptions: accounting_that_is_away_is_not_an_answer",
    ],
    "an unknown state": ["slurm/interruptions: an_unknown_state_is_no_end"],
    "hung rank": ["slurm/interruptions: a_hung_rank_is_found_by_its_heartbeat"],
    "MLflow dies or hangs": [
        "mlflow_away: nothing_is_lost_doubled_or_failed",
        "mlflow_away: the_same_of_a_server_that_is_killed",
        "mlflow_away: the_command_and_the_sensor_send_what_is_pending",
        "mlflow_away: a_run_whose_orchestrator_died_after_the_job_is_ended",
        "mlflow_away: a_request_that_is_served_late_doubles_no_run",
        "pipelines/assets/test_server_away.py: an_experiment_whose_server_goes_and_comes",
    ],
    "sbatch is refused for ever": [
        "fake: waiting_for_a_target_has_a_bound_and_says_what_it_waited_for",
    ],
    "sbatch answers for another cluster, or with other numbers": [
        "slurm/launcher: a_job_sent_to_another_cluster_is_refused_and_cancelled",
        "slurm/launcher: a_number_that_is_no_job_id_is_told_apart_by_the_name",
    ],
    "duplicate job script": [
        "slurm/interruptions: a_script_submitted_by_hand_does_no_harm",
        "slurm/interruptions: the_job_on_record_may_be_the_one_that_left",
    ],
    "two supervisors": ["slurm/interruptions: two_supervisors_at_once_make_one_job"],
    "slow file system": ["slurm/interruptions: files_may_be_seen_late"],
    "no hard links": ["core/test_files.py: one_of_many_processes_creates_a_file"],
    "an end asked for between attempts": [
        "fake: an_end_asked_for_between_attempts_stops_the_next_one",
        "fake: an_unfinished_job_without_a_supervisor_is_cancelled_too",
    ],
}

BAD_INPUT = {
    "unknown target or profile": [
        "commands: plan_says_what_is_wrong",
        "commands: a_profile_of_another_target_is_refused",
        "plan: the_projects_profiles_come_before_the_shipped_and_an_unknown_one_names_all",
    ],
    "partition that does not exist": [
        "slurm/preflight: a_partition_that_does_not_exist_names_those_there_are"
    ],
    "more GPUs than a node has": [
        "slurm/preflight: every_reason_is_given_at_once",
        "slurm/dagster: what_no_node_has_is_refused_on_the_asset_with_every_reason",
        "commands: launch_asks_this_computer_for_no_more_than_it_has",
    ],
    "time limit over the partition's": ["slurm/preflight: every_reason_is_given_at_once"],
    "names with shell characters": [
        "plan: a_wrong_profile_names_file_and_field",
        "plan: a_folder_that_no_script_can_name_is_refused",
        "slurm/launcher: any_folder_name_a_file_system_takes",
        "commands: launch_hands_every_argument_on",
        "slurm/profile: a_container_gets_every_word_as_it_is",
    ],
    "unwritable job folder": ["slurm/preflight: a_folder_that_cannot_be_written"],
    "unshared job folder": ["slurm/preflight: a_folder_the_login_node_does_not_see"],
    "missing interpreter on the node": [
        "slurm/preflight: a_missing_interpreter_on_the_node_fails_with_its_message",
        "deploy/test_run_experiment.py: what_is_missing_is_said_and_fails",
    ],
    "missing module": [
        "commands: a_module_that_does_not_exist_is_said_before_anything_starts",
        "slurm/profile: a_module_that_is_missing_fails_with_its_name",
        "deploy/test_run_experiment.py: a_module_that_is_missing_is_named",
    ],
}


@pytest.mark.parametrize(("row", "tests"), [*INTERRUPTIONS.items(), *BAD_INPUT.items()])
def test_every_row_has_its_tests(row, tests):
    for named in tests:
        place, name = named.split(": ")
        if not place.endswith(".py"):  # of this folder: plan, slurm/interruptions, …
            folder, _, module = place.rpartition("/")
            place = f"pipelines/launching/{folder}/test_{module}.py"
        path = TESTS / place
        assert f"\ndef test_{name}(" in path.read_text(), f"{row}: no test_{name} in {path}"
