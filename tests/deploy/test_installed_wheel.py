"""The installed wheel under the variables and commands of both deployments, without git.

What an image contains is made as its Dockerfile does: the copied files, ``SOURCE_COMMIT``, one wheel.
The packages it needs are those of this environment. Every server gets the variables that its manifest,
chart value or compose service sets, read from there, and nothing else but PATH and HOME; host names
become ports of this computer, and the bucket becomes a folder. PostgreSQL is a real one, prepared by
the script that the deployments mount.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml

from roma_pipelines.experiment import COMPONENT
from tests.deploy.test_kubernetes_deployment import (
    KUBECONFIG,
    VALUES,
    chart_instance,
    named,
    snake,
)
from tests.pipelines.real_postgres import real_postgres
from tests.pipelines.tiny import attributes
from tests.time_limits import wait_until, within

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "deploy" / "local"
COMPOSE = yaml.safe_load((LOCAL / "compose.yaml").read_text())
COMMIT = "0123456789abcdef0123456789abcdef01234567-dirty"
PASSWORDS = {f"{name}_POSTGRES_PASSWORD": f"{name.lower()}only1" for name in ("DAGSTER", "MLFLOW")}
COPIED = ("pyproject.toml", "README.md", "LICENSE", "setup.py", "roma_core", "roma_pipelines")
PROJECT = re.search(r"ROMA_PROJECT=(\S+)", (ROOT / "deploy/docker/Dockerfile").read_text())[1]
SCRIPTS = ("mlflow", "dagster", "dagster-webserver", "dagster-daemon")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder with ``bin``, where the wheel is installed; its PATH has everything but git."""
    folder = tmp_path_factory.mktemp("image")
    source, tools = folder / "source", folder / "tools"
    source.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "COMMIT")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    environment = os.environ | {"SOURCE_COMMIT": COMMIT}
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, env=environment, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = ["--python", str(folder / "bin" / "python"), "install", "--no-deps", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "of_this_environment.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    for name in SCRIPTS:
        _, _, body = (Path(sys.executable).parent / name).read_text().partition("\n")
        (folder / "bin" / name).write_text(f"#!{folder}/bin/python\n{body}")
        (folder / "bin" / name).chmod(0o755)
    tools.mkdir()
    for path in Path("/usr/bin").iterdir():
        if not path.name.startswith("git"):
            (tools / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def postgres():
    """A server whose databases the deployments' own script has made."""
    with real_postgres() as server:
        admin = os.environ | PASSWORDS
        admin |= {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGPASSWORD": server.password}
        admin["PATH"] = f"{server.binaries}:{admin['PATH']}"
        create = "CREATE ROLE postgres SUPERUSER LOGIN PASSWORD"
        import psycopg2

        session = psycopg2.connect(server.url("postgres"))
        session.autocommit = True
        session.cursor().execute(f"{create} %s", (server.password,))
        session.close()
        script = ROOT / "deploy" / "kubernetes" / "services" / "databases.sh"
        subprocess.run(["bash", script], check=True, env=admin, capture_output=True)
        yield server


def service_links():
    """The variables that Kubernetes adds to a pod: of all Services there are, and of older ones."""
    ports = {name: s["spec"]["ports"][0] for name, s in named("Service").items()}
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    ports["dagster-dagster-webserver"] = {"name": "http", "port": 3000}
    ports[deployment["name"]] = {"name": "grpc", "port": deployment["port"]}
    ports |= {name: {"name": "http", "port": 5000} for name in ("roma-mlflow", "roma-storage")}
    variables = {}
    for name, port in ports.items():
        prefix, number = name.replace("-", "_").upper(), port["port"]
        link = f"{prefix}_PORT_{number}_TCP"
        variables |= {f"{prefix}_SERVICE_HOST": "10.96.0.7", f"{prefix}_SERVICE_PORT": str(number)}
        variables[f"{prefix}_SERVICE_PORT_{port['name'].upper()}"] = str(number)
        variables |= {f"{prefix}_PORT": f"tcp://10.96.0.7:{number}", f"{link}_PROTO": "tcp"}
        variables |= {link: f"tcp://10.96.0.7:{number}", f"{link}_PORT": str(number)}
        variables[f"{link}_ADDR"] = "10.96.0.7"
    return variables


class Servers:
    """Processes of one deployment, in a folder of their own."""

    def __init__(self, image, postgres, folder):
        self.image, self.postgres, self.folder = image, postgres, folder
        self.running = {}
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        self.mlflow, self.code, self.web = (s.getsockname()[1] for s in listeners)
        for listener in listeners:
            listener.close()
        self.home, self.data = folder / "home", folder / "data"
        self.home.mkdir()
        experiment = self.data / "defs" / "waves" / "defs.yaml"
        experiment.parent.mkdir(parents=True)
        content = attributes(folder, pretraining={"trainer": {"epochs": 1, "batch_size": 32}})
        experiment.write_text(yaml.safe_dump({"type": COMPONENT, "attributes": content}))

    def here(self, value):
        """A value with the names of this computer in place of the deployment's."""
        places = {
            r"(roma-)?postgres:5432": f"127.0.0.1:{self.postgres.port}",
            r"(tracking|mlflow|localhost|127\.0\.0\.1):5000": f"127.0.0.1:{self.mlflow}",
            r"s3://mlflow": f"{self.folder}/artifacts",
            r"/data/roma": str(self.data),
        }
        for place, ours in places.items():
            value = re.sub(place, ours, value)
        return value

    def environment(self, variables):
        variables = {name: self.here(value) for name, value in variables.items()}
        path = f"{self.image}/bin:{self.image}/tools"
        project = self.here(PROJECT)
        return {"PATH": path, "HOME": str(self.folder), "ROMA_PROJECT": project, **variables}

    def start(self, name, command, variables):
        log = (self.folder / f"{name}.log").open("wb")
        environment = self.environment(variables)
        command[0] = shutil.which(command[0], path=environment["PATH"])
        self.running[name] = subprocess.Popen(
            list(map(str, command)), env=environment, cwd=self.folder, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def answers(self, name, port, path):
        assert self.running[name].poll() is None, self.log(name)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def ask(self, query, **variables):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.web}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=within(20)) as answer:
            document = json.load(answer)
        assert "errors" not in document, document
        return document["data"]

    def location(self):
        """The name and the state of the code location, as the webserver sees it."""
        query = """{ workspaceOrError { ... on Workspace { locationEntries { name
            locationOrLoadError { __typename ... on PythonError { message } } } } } }"""
        (entry,) = self.ask(query)["workspaceOrError"]["locationEntries"]
        return entry

    def commits(self):
        """The code that each run on the MLflow server names."""

        def search(what, **body):
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.mlflow}/api/2.0/mlflow/{what}/search",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=within(10)) as answer:
                return json.load(answer).get(what, [])

        experiments = search("experiments", max_results=9)
        ids = [experiment["experiment_id"] for experiment in experiments]
        runs = search("runs", experiment_ids=ids)
        tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
        return [found.get("roma.git_sha") for found in tags]

    def stop(self):
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(within(4))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def servers(image, postgres, tmp_path):
    servers = Servers(image, postgres, tmp_path)
    yield servers
    servers.stop()


def with_port(command, port):
    """A server's command with another port."""
    words = [str(word) for word in command]
    position = next(i for i, word in enumerate(words) if word in ("-p", "--port"))
    return [*words[: position + 1], str(port), *words[position + 2 :]]


def test_the_wheel_needs_no_git_and_names_its_commit(image, tmp_path):
    path = f"{image}/bin:{image}/tools"
    program = (
        "from roma_pipelines.registry.runs import code_version; print(code_version())\n"
        "import roma_pipelines.definitions as d\n"
        "print(d.__file__, *sorted({k.path[0] for k in d.defs().resolve_all_asset_keys()}))"
    )

    done = subprocess.run(
        [image / "bin" / "python", "-c", program],
        env={"PATH": path, "HOME": str(tmp_path), **service_links()},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip

    assert shutil.which("git", path=path) is None
    assert done.returncode == 0, done.stderr
    commit, place, *experiments = done.stdout.split()
    assert (commit, Path(place).is_relative_to(image)) == (COMMIT, True)
    assert {"plasticc", "japanese_vowels"} <= set(experiments)


OWN_EXPERIMENT = """
import sys, yaml
from pathlib import Path
from roma_pipelines.cli import main
from roma_pipelines.experiment import load_experiment
run = lambda *words: main(words, standalone_mode=False)
run("new-experiment", "mine", "--source", "mine.csv", "--label", "kind")
path = Path("defs/mine/defs.yaml")
tiny, document = yaml.safe_load(sys.argv[1]), yaml.safe_load(path.read_text())
document["attributes"] |= {name: tiny[name] for name in ("pretraining", "finetuning", "gate")}
path.write_text(yaml.safe_dump(document | {"attributes": document["attributes"] | {"measure_baselines": False}}))
run("plan", "mine", "--target", "slurm", "--profile", "leonardo")
run("demo", "mine")
"""


def test_an_experiment_of_a_users_own_is_trained_outside_a_checkout(image, tmp_path):
    """In a folder with nothing but a table; nothing is written where the packages are."""
    phases = np.random.default_rng(0).uniform(0, 6.3, 120)
    speeds = {"slow": 0.3, "medium": 0.9, "fast": 1.8}
    rows = [
        f"{i},{t},{np.sin(speed * t + phase):.4f},{np.cos(speed * t + phase):.4f},{kind}"
        for i, phase in enumerate(phases)
        for kind, speed in [list(speeds.items())[i % 3]]
        for t in range(12)
    ]
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.csv").write_text("\n".join(["id,time,x,y,kind", *rows, ""]))
    (packages,) = (image / "lib").glob("python*/site-packages")
    installed = {path: path.stat().st_mtime_ns for path in packages.rglob("*")}
    tiny = yaml.safe_dump(
        attributes(
            tmp_path, finetuning={"trainer": {"epochs": 12, "batch_size": 8, "base_lr": 0.01}}
        )
    )

    done = subprocess.run(
        [image / "bin" / "python", "-c", OWN_EXPERIMENT, tiny],
        env={"PATH": f"{image}/bin:{image}/tools", "HOME": str(tmp_path)},
        cwd=folder, capture_output=True, text=True, timeout=within(120),
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "boost_usr_prod" in done.stdout  # of the shipped profile
    assert "model       mine version 1 (champion, candidate)" in done.stdout
    assert "next        roma-pipeline up" in done.stdout
    assert {path.name for path in folder.iterdir()} == {"mine.csv", "defs", ".roma"}
    assert {path: path.stat().st_mtime_ns for path in packages.rglob("*")} == installed


def test_a_package_in_another_repository_does_not_take_its_commit(tmp_path):
    """Such as the repository that the folder of the environment is in."""
    for name in ("roma_core", "roma_pipelines"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "lib" / name, ignore=ignored)
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "mine"]):
        subprocess.run([*git, *command], check=True)
    program = "from roma_pipelines.registry.runs import code_version as c; print(c())"

    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.startswith("release ")


def test_compose_materialises_an_asset(servers):
    """MLflow, code server, webserver and daemon as compose starts them, and a run through all."""

    def variables(service):
        found = COMPOSE["services"][service].get("environment", {})
        given = {**PASSWORDS, "OBJECTS_ACCESS_KEY": "key", "OBJECTS_SECRET_KEY": "secret"}
        return {
            name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda m: given[m[1]], value)
            for name, value in found.items()
        } | {"DAGSTER_HOME": str(servers.home), "ROMA_STORAGE_ROOT": "/data/roma"}

    instance = yaml.safe_load((LOCAL / "dagster.yaml").read_text())
    instance["storage"]["postgres"]["postgres_db"] |= {
        "hostname": "127.0.0.1",
        "port": servers.postgres.port,
    }
    (servers.home / "dagster.yaml").write_text(yaml.safe_dump(instance))
    workspace = yaml.safe_load((LOCAL / "workspace.yaml").read_text())
    workspace["load_from"][0]["grpc_server"] |= {"host": "127.0.0.1", "port": servers.code}
    (servers.home / "workspace.yaml").write_text(yaml.safe_dump(workspace))

    for name, port in (("mlflow", servers.mlflow), ("code", servers.code)):
        command = COMPOSE["services"][name]["command"]
        servers.start(name, with_port(command, port), variables(name))
    _answering(servers)
    at_home = {"/opt/dagster/home/workspace.yaml": servers.home / "workspace.yaml"}
    web = [at_home.get(word, word) for word in COMPOSE["services"]["webserver"]["command"]]
    servers.start("webserver", with_port(web, servers.web), variables("webserver"))
    daemon = [at_home.get(word, word) for word in COMPOSE["services"]["daemon"]["command"]]
    servers.start("daemon", daemon, variables("daemon"))
    wait_until(lambda: servers.answers("webserver", servers.web, "/server_info"), 60, "webserver")
    assert servers.location()["locationOrLoadError"]["__typename"] == "RepositoryLocation"

    launched = servers.ask(
        """mutation ($p: ExecutionParams!) { launchRun(executionParams: $p) {
            __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
        p={
            "selector": {
                "repositoryLocationName": "roma_pipelines",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": ["waves", "dataset"]}],
            },
            "mode": "default",
        },
    )["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run = launched["run"]["runId"]

    def status():
        query = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        return servers.ask(query, id=run)["runOrError"]["status"]

    wait_until(lambda: status() in ("SUCCESS", "FAILURE", "CANCELED"), 90, "the run's end")
    assert status() == "SUCCESS", servers.log("code")
    assert servers.commits() == []  # nothing is trained yet, and the server answers


def _answering(servers):
    wait_until(lambda: servers.answers("mlflow", servers.mlflow, "/health"), 60, "MLflow")

    def code():
        check = ["dagster", "api", "grpc-health-check", "-p", str(servers.code)]
        check[0] = str(servers.image / "bin" / "dagster")
        assert servers.running["code"].poll() is None, servers.log("code")
        environment = servers.environment({})
        return subprocess.run(check, env=environment, capture_output=True).returncode == 0

    wait_until(code, 60, "the code server")


def test_kubernetes_starts_every_server_and_a_run_trains(servers, tmp_path):
    """As manifests and chart start them; the pod of a run is one that materialises here."""

    def variables(entries):
        found = {**service_links(), **PASSWORDS}
        for entry in entries:
            key = entry.get("valueFrom", {}).get("secretKeyRef", {}).get("key")
            value = entry.get("value", PASSWORDS["MLFLOW_POSTGRES_PASSWORD"] if key else "")
            found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda m: found[m[1]], value)
        return found

    pod = named("Deployment")["roma-mlflow"]["spec"]["template"]["spec"]
    (mlflow,) = pod["containers"]
    servers.start("mlflow", with_port(mlflow["command"], servers.mlflow), variables(mlflow["env"]))

    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(KUBECONFIG)
    postgres, instance = VALUES["postgresql"], chart_instance(kubeconfig)
    database = {
        "username": postgres["postgresqlUsername"],
        "password": {"env": "DAGSTER_PG_PASSWORD"},
        "hostname": "127.0.0.1",
        "db_name": postgres["postgresqlDatabase"],
        "port": servers.postgres.port,
        "params": {},
        "scheme": postgres["postgresqlScheme"],
    }
    for part in ("run_storage", "event_log_storage", "schedule_storage"):
        instance[part] = {
            "module": f"dagster_postgres.{part.removesuffix('_storage') if 'log' in part else part}",
            "class": f"Postgres{part.title().replace('_', '')}",
            "config": {"postgres_db": database},
        }
    (servers.home / "dagster.yaml").write_text(yaml.safe_dump(instance))
    workspace = tmp_path / "workspace.yaml"
    server = {"host": "127.0.0.1", "port": servers.code, "location_name": "roma_pipelines"}
    workspace.write_text(yaml.safe_dump({"load_from": [{"grpc_server": server}]}))

    shared = [
        {"name": "DAGSTER_HOME", "value": str(servers.home)},
        {"name": "DAGSTER_PG_PASSWORD", "value": PASSWORDS["DAGSTER_POSTGRES_PASSWORD"]},
    ]
    (deployment,) = VALUES["dagster-user-deployments"]["deployments"]
    context = {"k8s": snake({"env": deployment["env"], "resources": deployment["resources"]})}
    handed_on = {"name": "DAGSTER_CLI_API_GRPC_CONTAINER_CONTEXT", "value": json.dumps(context)}
    code = ["dagster", "api", "grpc", "-h", "0.0.0.0", "-p", servers.code]
    code += deployment["dagsterApiGrpcArgs"]
    servers.start("code", code, variables([*shared, handed_on, *deployment["env"]]))
    _answering(servers)
    web = ["dagster-webserver", "-h", "0.0.0.0", "-p", servers.web, "-w", workspace]
    servers.start("webserver", web, variables(shared))
    servers.start("daemon", ["dagster-daemon", "run", "-w", workspace], variables(shared))
    wait_until(lambda: servers.answers("webserver", servers.web, "/server_info"), 60, "webserver")
    assert servers.location()["locationOrLoadError"]["__typename"] == "RepositoryLocation"

    run = ["asset", "materialize", "-m", "roma_pipelines.definitions", "--select"]
    run.append('key:"waves/dataset" or key:"waves/pretrained_encoder"')
    entries = [
        *shared,
        *deployment["env"],
        {"name": "ROMA_DAGSTER_EXECUTOR", "value": "in_process"},
    ]
    done = subprocess.run(
        [servers.image / "bin" / "dagster", *run],
        env=servers.environment(variables(entries)),
        cwd=tmp_path, capture_output=True, text=True, timeout=within(90),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert servers.commits() == [COMMIT]
    assert servers.running["daemon"].poll() is None, servers.log("daemon")
