"""Predictions of many series by any number of processes: in parts, and as a job of a launcher.

The input is cut into parts. Process r of n predicts the r-th run of those that are missing and writes each
to a file of its own, whole or not at all. So processes need no lock, and after a kill the
same call resumes. Process 0 makes the parts the output once all are there.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from roma_core.claim import FOLDER_VARIABLE
from roma_core.files import digest_of, read_json, write_bytes
from roma_core.job import Attempt, JobFolder, StopRequests
from roma_core.progress import Progress
from roma_core.run_job import Work
from roma_core.serving import batch, pyfunc_model, registry_client
from roma_core.settings import Frozen

_POLL_S = 0.5
RANK, WORLD_SIZE, LOCAL_RANK = (
    int(os.environ.get(name, default))
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
)


@dataclass(frozen=True)
class Predictions:
    """The predictions of an input by one model: their parts, and the file or folder they become.

    Until then parts stand in ``OUTPUT.parts``, under names with a digest of input and model: those of
    another input or model are never taken for these.
    """

    source: Path | str
    split: str
    lineage: Mapping[str, str]
    """Columns that are equal in every row: the model's name, version and sha256."""
    output: Path
    one_file: bool = True
    """Whether the parts are joined to one file, or become the files of a Parquet data set."""

    @cached_property
    def counts(self) -> dict[str, int]:
        """Series of each file of the input."""
        return {
            file: batch.count_series(file, self.split) for file in batch.input_files(self.source)
        }

    @cached_property
    def parts(self) -> list[tuple[str, int, int]]:
        """File, number of the part in the file, and series, of each part."""
        return [
            (file, k, min(batch.SERIES_PER_PART, n - k * batch.SERIES_PER_PART))
            for file, n in self.counts.items()
            for k in range(-(-n // batch.SERIES_PER_PART))
        ]

    @cached_property
    def source_digest(self) -> str:
        """Of the names, sizes and times of the input's files."""
        import fsspec

        stamps: list[Any] = []
        for file in self.counts:
            fs, root = fsspec.core.url_to_fs(file)
            for path, info in sorted(fs.find(root, detail=True).items()):
                stamps.append([path, info["size"], str(info.get("mtime", info.get("ETag")))])
        return digest_of([stamps, self.split])

    @cached_property
    def digest(self) -> str:
        """Of the input, the model, and the cut."""
        return digest_of([self.source_digest, dict(self.lineage), batch.SERIES_PER_PART])[:16]

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    def path(self, number: int) -> Path:
        return self.folder / f"{self.digest}-{number:06d}.parquet"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not written, ascending."""
        found = {path.name for path in self.folder.glob(f"{self.digest}-*.parquet")}
        return [number for number in range(len(self.parts)) if self.path(number).name not in found]

    def n_done(self) -> int:
        """Series of the parts that are written."""
        missing = set(self.missing())
        return sum(n for number, (_, _, n) in enumerate(self.parts) if number not in missing)

    def write(
        self, package: Any, numbers: Sequence[int], after_part: Callable[[], bool] = lambda: True
    ) -> bool:
        """Predict and write these parts, ascending, as long as ``after_part`` says so; True after all.

        Columns: ``id``; ``label`` and ``probabilities`` (map), ``values`` and perhaps ``std`` (maps of
        targets) of a regressor, or ``features`` (list) of an encoder;
        those of ``lineage``; ``scored_at`` (UTC). ``package`` comes from ``registry_client.load``.
        Raises ValueError if a series does not fit; the message names its row.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        by_file: dict[str, dict[int, int]] = {}
        for number in numbers:
            file, k, _ = self.parts[number]
            by_file.setdefault(file, {})[k] = number
        for file, wanted in by_file.items():
            left = dict(wanted)
            for k, chunk in batch.read_chunks(file, self.split, package, wanted):
                number, first = left.pop(k), k * batch.SERIES_PER_PART
                n = self.parts[number][2]
                try:
                    table = batch.score(package, chunk, dict(self.lineage))
                except ValueError as error:
                    rows = f"rows {first} to {first + n - 1} of {file}"
                    raise ValueError(f"{rows}: {error}") from error
                if len(table) != n:
                    raise ValueError(f"{file} changed while it was read; repeat the command")
                content = pa.BufferOutputStream()
                pq.write_table(table, content, compression="zstd")
                # not earlier, so that a rejected file leaves nothing behind
                self.folder.mkdir(parents=True, exist_ok=True)
                write_bytes(self.path(number), content.getvalue())
                if not after_part():
                    return False
                if not left:
                    break
            if left:
                raise ValueError(f"{file} became shorter while it was read; repeat the command")
        return True

    def publish(self) -> None:
        """Make the parts the output, in one step. Parts of another input or model are removed."""
        import pyarrow.parquet as pq

        if not self.parts:
            raise ValueError(f"{self.source} holds no series; give another input or --split")
        paths = [self.path(number) for number in range(len(self.parts))]
        if self.one_file:
            aside = self.output.with_name(f".{self.output.name}.joining")
            with pq.ParquetWriter(aside, pq.read_schema(paths[0]), compression="zstd") as writer:
                for path in paths:
                    writer.write_table(pq.read_table(path))
            aside.replace(self.output)
            _remove(self.folder)
        else:
            _remove(self.folder, keep=frozenset(paths))
            self.folder.rename(self.output)

    def is_published(self) -> bool:
        """Whether the output is a folder of exactly these predictions, or was made by this call.

        Raises ValueError if the folder exists and holds anything else.
        """
        if self.one_file or not self.output.exists():
            return False
        found = {path.name for path in self.output.iterdir()}
        if found != {self.path(number).name for number in range(len(self.parts))}:
            raise ValueError(
                f"{self.output} exists and holds something else; choose another output, or remove it"
            )
        return True

    def run(
        self,
        package: Any,
        *,
        numbers: Sequence[int] | None = None,
        progress: Callable[[int], object] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        working: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> bool:
        """Do the work of this process: all, or these parts, or its own among those of torchrun.

        Process 0 waits for the parts of all others and publishes, and calls ``progress`` with the number
        of series done by all. It waits outside of ``working``, the context of the work. False if stopped;
        raises ValueError as ``write`` does.
        """
        if self.is_published():
            return True
        if numbers is None:
            numbers = self._own_numbers()

        def may_continue() -> bool:
            if RANK == 0:
                n = self.n_done()
                if n and FOLDER_VARIABLE in os.environ:
                    JobFolder(os.environ[FOLDER_VARIABLE]).mark_checkpoint(n)
                progress(n)
            return not stop()

        with working():
            if not (may_continue() and self.write(package, numbers, may_continue)):
                return False
        while RANK == 0 and self.missing():
            time.sleep(_POLL_S)
            if not may_continue():
                return False
        if RANK == 0:
            self.publish()
        return True

    def _own_numbers(self) -> list[int]:
        numbers = self.missing()
        if WORLD_SIZE > 1:  # process 0 may publish once all know what is missing
            import torch.distributed as dist

            dist.init_process_group("gloo")
            known: list[Any] = [None] * WORLD_SIZE
            dist.all_gather_object(known, (self.digest, numbers))
            dist.destroy_process_group()
            if len({digest for digest, _ in known}) > 1:
                raise ValueError(f"{self.source} changes, or is not the same on all nodes")
            numbers = known[0][1]  # others may see fewer files
        return _runs(numbers, WORLD_SIZE)[RANK]

    @contextmanager
    def others(
        self, model: Path, n: int
    ) -> Iterator[Callable[[Any, Callable[[int], object]], None]]:
        """Start ``n - 1`` processes on this computer, which load ``model`` at the same time as this one.

        Yields ``run(package, progress)``, with which all predict; nothing is written before. It raises
        RuntimeError if another process failed or was killed.
        """
        spawn = multiprocessing.get_context("spawn")
        errors, may_write = spawn.SimpleQueue(), spawn.Event()
        numbers: Sequence[Any] = [None] if n == 1 else _runs(self.missing(), n)
        threads = max(1, (os.cpu_count() or 1) // n)
        others = [
            spawn.Process(target=_write, args=(self, model, own, k, threads, may_write, errors))
            for k, own in enumerate(numbers)
            if k and own
        ]

        def run(package: Any, progress: Callable[[int], object]) -> None:
            if self.is_published():
                return
            if n > 1:
                _limit_threads(threads)
            may_write.set()
            if not self.run(package, numbers=numbers[0], progress=progress, stop=failed):
                codes = [process.exitcode for process in others if process.exitcode]
                reason = f"a process ended with code {codes[0]}; repeat the command to resume"
                raise RuntimeError(reason if errors.empty() else errors.get())

        def failed() -> bool:
            return any(process.exitcode for process in others)

        started = []
        try:
            for process in others:
                process.daemon = True
                process.start()
                started.append(process)
            yield run
        finally:
            for process in started:
                process.kill()


def _runs(numbers: list[int], n: int) -> list[list[int]]:
    """The numbers in ``n`` runs, so that each process reads its own row groups of a file."""
    ends = [len(numbers) * k // n for k in range(n + 1)]
    return [numbers[start:end] for start, end in pairwise(ends)]


def _remove(folder: Path, keep: frozenset[Path] = frozenset()) -> None:
    """Remove our files from a folder of parts, and the folder if it then is empty."""
    if not folder.is_dir():
        return
    ours = r"\.?[0-9a-f]{16}-\d{6}\.parquet.*|\d{5}\.par.*|state\.json"  # or of an earlier version
    for path in folder.iterdir():  # with the hidden ones of writers that were killed
        if re.fullmatch(ours, path.name) and path not in keep:
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _limit_threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


def _write(
    predictions: Predictions,
    model: Path,
    numbers: list[int],
    rank: int,
    threads: int,
    may_write: Any,
    errors: Any,
) -> None:
    """What another process of ``Predictions.others`` does; it ends with the one that started it."""
    _limit_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        package = load_package(model, rank)
        while parent.is_alive() and not may_write.wait(_POLL_S):
            pass
        predictions.write(package, numbers, parent.is_alive)
    except (ValueError, RuntimeError, OSError) as error:
        errors.put(str(error))
        raise SystemExit(1) from None


def load_package(model: Path, rank: int = LOCAL_RANK) -> Any:
    """The package of a downloaded model, or in a folder of its own, on the GPU of this process if any."""
    import torch

    options = {}
    if torch.cuda.is_available():
        options["device"] = f"cuda:{rank % torch.cuda.device_count()}"
    if not (model / "package.json").exists():
        return registry_client.load(model, **options)
    package: Any = pyfunc_model.open_package(model, **options)
    package.module = pyfunc_model
    return package


class PredictionJobConfig(Frozen):
    """The frozen configuration of a job that predicts."""

    schema_version: Literal[1] = 1
    model: str  # folder of the downloaded model
    lineage: dict[str, str]
    source: str
    split: str
    output: str | None  # one file; None: a Parquet data set in the job's folder


def run_prediction_job(folder: JobFolder, attempt: Attempt) -> Work:
    """Predict as one of the processes of a job; a part that is written counts as a checkpoint."""
    config = PredictionJobConfig.model_validate(read_json(folder.config))
    output = Path(config.output or folder.outputs / "predictions")
    output.parent.mkdir(parents=True, exist_ok=True)
    predictions = Predictions(
        config.source, config.split, config.lineage, output, one_file=config.output is not None
    )
    total, first, started = sum(predictions.counts.values()), predictions.n_done(), time.monotonic()
    digest = predictions.source_digest  # before reading, so that a later change is detected
    package = load_package(Path(config.model))
    speed = 0.0
    shown = Progress("predict", total, first)
    with StopRequests(attempt.stop) as requests, shown if RANK == 0 else nullcontext():

        def progress(n: int) -> None:
            nonlocal speed
            speed = (n - first) / (time.monotonic() - started)
            shown.update(n, {"series_per_s": speed})

        if not predictions.run(
            package, progress=progress, stop=requests.requested, working=attempt.beating
        ):
            return Work("continue", WORLD_SIZE, reason=requests.reason)
    facts, outputs = _drift(config, package, folder) if RANK == 0 else ({}, {})
    facts |= {"series": total, "series_per_s": round(speed, 1), "source_digest": digest}
    outputs |= {"predictions": str(output)}
    return Work("completed", WORLD_SIZE, step=total, outputs=outputs, facts=facts)


def _drift(
    config: PredictionJobConfig, package: Any, folder: JobFolder
) -> tuple[dict[str, Any], dict[str, str]]:
    """How far the first 2,000 series are from the training data, if the model carries its profile."""
    from roma_core.evaluation.drift import ReferenceProfile, sample_from_rows
    from roma_core.evaluation.drift_job import compare

    model = Path(config.model)
    found = model if (model / "package.json").exists() else registry_client.package_of(model)
    document = read_json(found / "profile.json")
    if not document:
        return {}, {}
    rows = islice(batch.read_series(config.source, config.split, package), 2000)
    covariates = getattr(package, "covariates", [])  # the code of the model may be older
    sample = sample_from_rows(rows, package.axes, package.channels, covariates)
    return compare(ReferenceProfile.model_validate(document), sample, folder)
