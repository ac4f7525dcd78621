"""``make setup``: ``python install.py FOLDER`` makes a virtual environment, with the versions of constraints.txt.

uv installs, that on PATH or one from the package index. It does not read pip's configuration, so what
``pip config list`` says of indexes, constraints and certificates is passed to it. Where uv cannot be had,
has nothing for a setting of pip, or fails, pip installs.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

NEEDED = (
    "import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 15) else "
    "'Python 3.11 to 3.14 is needed, this is ' + sys.version.split()[0] + '; set PYTHON=...')"
)
PINNED = ["-c", "constraints.txt"]
PROJECT = ["-e", ".[dev]"]
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
SAME_RESULT = {  # settings that do not change what is installed
    *("cache-dir", "default-timeout", "disable-pip-version-check", "no-color", "no-input", "quiet"),
    *("progress-bar", "require-virtualenv", "retries", "root-user-action", "timeout", "verbose"),
}


def pip_settings(listed: str) -> dict[str, list[str]]:
    """What holds for ``pip install`` in the output of ``pip config list``."""
    found = {}
    for section in ("global.", "install.", ":env:."):  # the later win
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section):
                found[name[len(section) :]] = ast.literal_eval(value).split()
    return found


def uv_variables(settings: dict[str, list[str]]) -> dict[str, str]:
    """Variables of uv with the same effect; ValueError names a setting that has none."""
    if unknown := sorted(settings.keys() - UV_VARIABLES.keys() - SAME_RESULT - {"constraint"}):
        raise ValueError(f"pip's setting {unknown[0]} cannot be passed to uv")
    # as pip does: the best version of all indexes, rather than the first index that has one
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_SYSTEM_CERTS": "1"}
    for name in settings.keys() & UV_VARIABLES.keys():
        found[UV_VARIABLES[name]] = ("," if name == "find-links" else " ").join(settings[name])
    return found


def install_with_uv(python: str, torch: list[str]) -> None:
    """Raises ValueError, OSError or CalledProcessError if it cannot."""
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    listed = subprocess.run([*pip, "config", "list"], stdout=subprocess.PIPE, text=True, check=True)
    settings = pip_settings(listed.stdout)
    environment = {**uv_variables(settings), **os.environ}
    uv = shutil.which("uv") or str(Path(python).with_name("uv"))
    if not Path(uv).exists():
        subprocess.run([*pip, "install", *PINNED, "uv"], check=True)
    cache = Path(subprocess.check_output([uv, "cache", "dir"], text=True).strip())
    while not cache.exists():
        cache = cache.parent
    if cache.stat().st_dev != Path(python).parent.stat().st_dev:  # hard links are impossible
        environment.setdefault("UV_LINK_MODE", "copy")
    constraints = [word for path in settings.get("constraint", []) for word in ("-c", path)]
    install = [uv, "pip", "install", "--python", python, *PINNED, *constraints]
    for build in torch:
        trial = [*install, "--quiet", "--dry-run", build]
        options = {"env": environment, "stderr": subprocess.DEVNULL}
        if build == torch[-1] or subprocess.run(trial, **options).returncode == 0:
            # bytecode is compiled on first import: three quarters of the modules never are
            subprocess.run([*install, build, *PROJECT], env=environment, check=True)
            return


def install_with_pip(python: str, torch: list[str]) -> None:
    """Raises CalledProcessError if it cannot."""
    install = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    for build in torch:  # before what needs it, which would bring the default build
        errors = None if build == torch[-1] else subprocess.DEVNULL
        if subprocess.run([*install, build], stderr=errors).returncode == 0:
            break
    subprocess.run([*install, *PINNED, *PROJECT], check=True)


def main(folder: str) -> None:
    python = str(Path(folder, "bin", "python"))
    is_there = Path(python).exists()
    subprocess.run([python if is_there else sys.executable, "-c", NEEDED], check=True)
    if not Path(folder, "bin", "pip").exists():  # uv makes environments without it
        make = [python, "-m", "ensurepip", "--default-pip"]
        make = make if is_there else [sys.executable, "-m", "venv", folder]
        subprocess.run(make, check=True)
    pins = Path("constraints.txt").read_text(encoding="utf-8").split()
    (pin,) = (pin for pin in pins if pin.startswith("torch=="))
    # some indexes carry the CPU build under a version of its own; the default one may bring CUDA
    torch = [pin] if shutil.which("nvidia-smi") else [f"{pin}+cpu", pin]
    print(f"installing into {folder} with uv (versions of constraints.txt)", flush=True)
    try:
        install_with_uv(python, torch)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        # without the command, whose options may have credentials
        failed = isinstance(error, subprocess.CalledProcessError)
        why = "it failed, as printed above" if failed else error
        print(f"without uv ({why}): pip installs, in minutes", flush=True)
        install_with_pip(python, torch)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except subprocess.CalledProcessError as error:  # its own message is above
        sys.exit(error.returncode)
