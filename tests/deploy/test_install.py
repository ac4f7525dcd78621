"""``make setup``: uv gets what pip is configured with, and pip installs where uv cannot."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("install", ROOT / "deploy" / "install.py")
install = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(install)
LISTED = r"""global.constraint='/etc/pip/constraints.txt'
global.find-links='/other'
install.extra-index-url='\nhttps://b.example/simple\nfile:///c'
:env:.find-links='/wheels /more'
:env:.cert='/ca.pem'
:env:.timeout='180'
download.index-url='https://x.example'
global.index-url='https://a.example/simple'
"""


def test_what_pip_is_configured_with_reaches_uv():
    settings = install.pip_settings(LISTED)

    assert settings["constraint"] == ["/etc/pip/constraints.txt"]
    assert install.uv_variables(settings) == {
        "UV_DEFAULT_INDEX": "https://a.example/simple",
        "UV_INDEX": "https://b.example/simple file:///c",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_SYSTEM_CERTS": "1",
        "SSL_CERT_FILE": "/ca.pem",
    }
    with pytest.raises(ValueError, match="pip's setting no-binary cannot be passed to uv"):
        install.uv_variables(settings | {"no-binary": ["numpy"]})


def test_python_is_checked_first(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(sys, "version", "3.10.4 (main)")
    with pytest.raises(SystemExit, match=r"Python 3\.11 to 3\.14 is needed, this is 3\.10\.4"):
        exec(install.NEEDED)


@pytest.mark.parametrize("uv_fails", [False, True])
@pytest.mark.parametrize("has_cpu_build", [True, False])
def test_pip_installs_where_uv_fails(monkeypatch, tmp_path, capfd, uv_fails, has_cpu_build):
    """Either takes the CPU build of torch if there is no GPU and an index has it."""
    commands = []

    def run(command, **options):
        commands.append([Path(word).name if word.startswith("/") else word for word in command])
        is_uv, of_cpu = command[0] == "/bin/uv", command[-1].endswith("+cpu")
        failed = (is_uv and uv_fails and "--dry-run" not in command) or (of_cpu > has_cpu_build)
        if failed and options.get("check"):
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, int(failed), stdout="")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.subprocess, "check_output", lambda *_, **__: f"{tmp_path}\n")
    monkeypatch.setattr(install.shutil, "which", {"uv": "/bin/uv"}.get)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()

    install.main(str(tmp_path))

    (torch,) = {word for word in commands[-1] if word.startswith("torch")} or {commands[-2][-1]}
    assert torch.endswith("+cpu") == has_cpu_build
    assert commands[-1][0] == ("python" if uv_fails else "uv")
    assert commands[-1][-2:] == ["-e", ".[dev]"] and "constraints.txt" in commands[-1]
    assert ("without uv (it failed" in capfd.readouterr().out) == uv_fails
