"""The image and the local installation, checked without Docker."""

import re
from pathlib import Path

import dagster as dg
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
IGNORED = (ROOT / "deploy" / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
COMPOSE = yaml.safe_load((ROOT / "deploy" / "local" / "compose.yaml").read_text())
EXAMPLE = (ROOT / "deploy" / "local" / "example.env").read_text()


def test_what_the_image_copies_is_there_and_not_ignored():
    copied = [
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    allowed = [line.removeprefix("!") for line in IGNORED if line.startswith("!")]

    assert len(copied) >= 7
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in allowed, source


def test_the_image_is_not_root_and_pinned():
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]

    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE) == ["10001:10001"]
    assert "-c constraints.txt" in DOCKERFILE
    assert all(":" in image for image in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))
    assert "cuda)" in DOCKERFILE and "cpu)" in DOCKERFILE


@pytest.mark.parametrize("package", ["dagster-postgres", "psycopg2-binary", "boto3", "torch"])
def test_what_the_image_adds_is_locked(package):
    assert re.search(rf"^{package}==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_everything_local_is_bound_to_this_computer():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]

    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_come_from_the_env_file_and_have_no_default():
    text = (ROOT / "deploy" / "local" / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{([A-Z_]+)(:\?)?", text))

    assert {required for _, required in used} == {":?"}
    assert {name for name, _ in used} == set(re.findall(r"^([A-Z_]+)=", EXAMPLE, re.MULTILINE))


def test_what_is_mounted_is_there():
    here = ROOT / "deploy" / "local"
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (here / source).exists(), volume


def test_dagster_takes_the_local_instance(tmp_path):
    document = yaml.safe_load((ROOT / "deploy" / "local" / "dagster.yaml").read_text())
    assert document.pop("storage")["postgres"]["postgres_db"]["hostname"] in COMPOSE["services"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(document))

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.run_retries_enabled
        assert instance.run_monitoring_settings["free_slots_after_run_end_seconds"] == 60


def test_the_image_names_its_commit_without_git():
    """And compiles nothing but what pip installs: some files of torch are not meant for every Python."""
    build = DOCKERFILE[: DOCKERFILE.rindex("\nFROM")]
    declared, installed = build.index("ARG SOURCE_COMMIT\n"), build.index("pip install --no-deps .")

    assert 'SOURCE_COMMIT="$SOURCE_COMMIT" pip install --no-deps .' in build
    assert declared < installed and build.index("COPY setup.py") < installed
    assert "apt-get" not in DOCKERFILE and "compileall" not in DOCKERFILE
    assert COMPOSE["services"]["code"]["build"]["args"] == ["SOURCE_COMMIT"]
