"""What every command of ``roma`` and ``roma-pipeline`` shares: help, Ctrl-C, closed pipes, completion."""

import errno
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import roma_core.cli
from roma_core.cli import main as roma
from roma_pipelines.cli import (
    complete_experiment,
    complete_job,
    complete_profile,
    complete_version,
)
from roma_pipelines.cli import main as roma_pipeline
from tests.pipelines.operations.conftest import client, job  # noqa: F401

PROGRAMS = {"roma": roma, "roma-pipeline": roma_pipeline}


def commands(command, path):
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), f"{path} {name}")


ALL = {path: one for name, main in PROGRAMS.items() for path, one in commands(main, name)}


@pytest.mark.parametrize("path", ALL)
def test_the_example_of_every_help_is_accepted_and_ctrl_c_is_one_line(path, monkeypatch):
    example = ALL[path].epilog.removeprefix("Example: ")
    program, *arguments = shlex.split(example)
    assert example.startswith(path)
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))
    called = next(
        command
        for path, command in sorted(ALL.items(), key=lambda item: -len(item[0]))
        if f"{example} ".startswith(f"{path} ") and not isinstance(command, click.Group)
    )

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(called, "callback", interrupted)
    monkeypatch.setattr(roma_core.cli, "run_in_folder", interrupted)  # of --job

    done = CliRunner().invoke(PROGRAMS[program], arguments)

    assert (done.exit_code, done.output) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),  # the reader left
        (OSError(errno.ENOSPC, "No space left"), "Error: [Errno 28] No space left\n"),
        (ValueError("two epochs are needed"), "Error: two epochs are needed\n"),
    ],
)
def test_errors_are_messages_but_for_a_closed_pipe(error, said, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("roma_pipelines.cli.status._state", fail)

    done = CliRunner().invoke(roma_pipeline, ["status"])

    assert (done.exit_code, done.output) == (1, said)


def test_the_program_alone_shows_the_state_and_the_next_step(storage, job, client):  # noqa: F811
    def said():
        return json.loads(CliRunner().invoke(roma_pipeline, ["status", "--json"]).output)

    before = said()
    assert before["next"].startswith("roma-pipeline demo japanese_vowels")
    assert {one["stage"] for one in before["experiments"]} == {None}
    client.create_registered_model("japanese_vowels")
    client.create_model_version("japanese_vowels", "file:///x", None)
    client.set_registered_model_alias("japanese_vowels", "champion", "1")
    job("a", "failed", asset="japanese_vowels/evaluation_report")
    job("b", asset="of_another_project/dataset")
    (storage.root / "servers.json").write_text('{"MLflow": "http://127.0.0.1:1"}')

    found = said()

    (vowels,) = (one for one in found["experiments"] if one["name"] == "japanese_vowels")
    assert (vowels["champion"], vowels["stage"]) == ("1", "evaluation_report")
    assert found["servers"] == {"MLflow": {"url": "http://127.0.0.1:1", "answers": False}}
    assert found["next"].startswith("roma-pipeline jobs logs aaaaaaaaaaaa")
    assert "of_another_project" in [one["name"] for one in found["experiments"]]
    text = CliRunner().invoke(roma_pipeline).output
    assert re.search("japanese_vowels +champion 1 +evaluation_report failed, 0 s ago", text)
    assert "failed      aaaaaaaaaaaa  japanese_vowels/evaluation_report: " in text
    assert text.endswith(f"next        {found['next']}\n")


JSON = (
    "jobs list --all",
    "jobs show aaa",
    "lineage waves/1",
    "lineage 0123456",
    "health",
    "status",
)


@pytest.fixture
def no_registry():
    """A server that answers with a page, as a proxy does, and then in another protocol."""
    answers = [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>log in</p>", b"SSH-2.0\r\n"]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for text in answers:
                with listener.accept()[0] as peer:
                    peer.recv(4096)
                    peer.sendall(text)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def test_status_survives_servers_that_are_none(storage, no_registry, monkeypatch):
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", no_registry)
    (storage.root / "servers.json").write_text(json.dumps({"Dagster": no_registry}))

    done = CliRunner().invoke(roma_pipeline, ["status"])

    assert done.exit_code == 0, done.exception
    assert f"MLflow does not answer at {no_registry}" in done.output
    assert f"{no_registry} does not answer\n" in done.output


def test_nothing_is_completed_where_settings_cannot_be_read(monkeypatch):
    monkeypatch.setenv("ROMA_PROJECT", "gone")
    monkeypatch.setenv("ROMA_STORAGE_ROT", "unknown")
    context = click.Context(roma_pipeline)
    for complete in (complete_experiment, complete_profile, complete_job, complete_version):
        assert complete(context, None, "") == []


def test_json_is_all_of_stdout_and_documented(storage, job, client):  # noqa: F811
    job("a")
    client.create_registered_model("waves")
    tags = {"roma.dataset_digest": "0123456789"}
    client.create_model_version("waves", "file:///x", None, tags)
    found = {}
    for command in JSON:
        done = CliRunner().invoke(roma_pipeline, [*command.split(), "--json"])
        assert done.exit_code == 0, done.output
        found[command] = json.loads(done.stdout)
    (listed,) = found["jobs list --all"]
    assert listed["status"] == found["jobs show aaa"]["attempts"][0]["end"]["status"] == "completed"
    assert found["lineage waves/1"]["facts"]["data set"] == "0123456789"
    assert found["lineage 0123456"] == [{"name": "waves", "version": "1", "role": "data set"}]
    page = (Path(__file__).parents[3] / "docs/commands.md").read_text()
    documented = set(re.findall(r"^\| `(roma[^`]*)` \|", page, re.MULTILINE))
    assert documented == {
        path for path, one in ALL.items() if any("--json" in option.opts for option in one.params)
    }


def test_the_state_needs_no_heavy_library():
    code = "import sys; import roma_pipelines.cli.status; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"dagster", "mlflow", "torch"} & set(loaded.split())


def test_bash_completes_commands_experiments_and_versions(storage, client, tmp_path):  # noqa: F811
    client.create_registered_model("waves")
    client.create_model_version("waves", "file:///x", None)
    client.set_registered_model_alias("waves", "candidate", "1")
    script = CliRunner().invoke(roma_pipeline, ["completion", "bash"]).output
    assert "complete -o nosort -F _roma_completion roma" in script
    program = f"{sys.executable}\n-m\nroma_pipelines.cli"  # the script splits at newlines
    lines = [script]
    cases = ["comple"], ["demo", "japan"], ["promote", "waves", ""], ["plan", "--profile", "leo"]
    for words in cases:
        lines.append(
            f"COMP_WORDS=({shlex.join(['roma-pipeline', *words])}) COMP_CWORD={len(words)}"
        )
        lines.append(f"COMPREPLY=(); _roma_pipeline_completion '{program}'; echo ${{COMPREPLY[@]}}")
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.split() == ["completion", "japanese_vowels", "1", "leonardo"], done.stderr
