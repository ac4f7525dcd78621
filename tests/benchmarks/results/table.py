"""Records of runs → the benchmarks' tables, in their place in a Markdown file."""

from __future__ import annotations

import datetime
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import t

from roma_core.files import write_bytes
from tests.benchmarks.results.benchmarks import Benchmark, Reference, Run
from tests.benchmarks.results.runs import Record

# also with something before or after: clean_rmse, mse_24_hz, log_loss
_LOWER_IS_BETTER = re.compile(r"(^|_)(n?r?mse|mae|loss|calibration_error)(_|$)")


def section_text(
    benchmark: Benchmark, records: Mapping[Run, Record], outdated: frozenset[Run]
) -> str:
    """A benchmark's section: protocol, command, a table, and what stands behind it.

    Args:
        outdated: runs whose record was made with settings that are no longer the experiment's.
    """
    have = {run: records[run] for run in benchmark.runs() if run in records}
    lines = [
        f"### {benchmark.name}",
        "",
        benchmark.protocol,
        "",
        f"    python -m tests.benchmarks.results {benchmark.name}",
        "",
    ]
    lines += _table(benchmark, have)
    lines.append("")
    lines += [_reference(reference) for reference in benchmark.references]
    lines += _made(benchmark, have)
    if stale := sorted(run.name for run in have if run in outdated):
        lines.append(f"- Made with earlier settings of the experiment: {', '.join(stale)}.")
    return "\n".join(lines) + "\n"


def _table(benchmark: Benchmark, have: Mapping[Run, Record]) -> list[str]:
    head = [
        "case",
        "metric",
        "here",
        *(reference.name for reference in benchmark.references),
        "against the best of them",
    ]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    for case in benchmark.cases:
        for metric in benchmark.metrics:
            found = [
                record.metrics[metric]
                for run, record in have.items()
                if run.case == case.name and metric in record.metrics
            ]
            others = [
                reference.values.get(metric, {}).get(case.name)
                for reference in benchmark.references
            ]
            runs = [case.name, metric.replace("_", " "), _ours(found, len(benchmark.seeds))]
            runs += ["–" if other is None else f"{other:g}" for other in others]
            rivals = [
                other
                for reference, other in zip(benchmark.references, others, strict=True)
                if other is not None and not reference.is_bound
            ]
            runs.append(_verdict(found, rivals, metric))
            lines.append("| " + " | ".join(runs) + " |")
    return lines


def _ours(found: Sequence[float], n_seeds: int) -> str:
    if not found:
        return "not run"
    spread = f" ± {_figure(statistics.stdev(found))}" if len(found) > 1 else ""
    seeds = f" ({len(found)} of {n_seeds} seeds)" if len(found) < n_seeds else ""
    return f"{_figure(statistics.mean(found))}{spread}{seeds}"


def _figure(value: float) -> str:
    """Three digits after the point, or three that count where these would say too little."""
    return f"{value:.3f}" if abs(value) >= 0.05 or value == 0 else f"{value:.3g}"


def _verdict(found: Sequence[float], others: Sequence[float], metric: str) -> str:
    """Ahead or behind of the best other figure only where the seeds' 95 % interval says so, else even."""
    if not found or not others:
        return "–"
    sign = -1 if _LOWER_IS_BETTER.search(metric) else 1
    margins = [min(sign * (ours - other) for other in others) for ours in found]
    margin = statistics.mean(margins)
    text = f"{'+' if margin >= 0 else '-'}{_figure(abs(margin))}"
    if len(margins) < 2:
        return f"{text}, one seed"
    quantile = float(t.ppf(0.975, len(margins) - 1))
    half = quantile * statistics.stdev(margins) / math.sqrt(len(margins))
    if abs(margin) <= half:
        return f"even, {text} ± {_figure(half)}"
    return f"{'ahead' if margin > 0 else 'behind'}, {text} ± {_figure(half)}"


def _reference(reference: Reference) -> str:
    like = "like for like" if reference.like_for_like else "not like for like"
    return f"- {reference.name}: {reference.source}; {like}."


def _made(benchmark: Benchmark, have: Mapping[Run, Record]) -> list[str]:
    if not have:
        return ["- Not run yet."]
    records = list(have.values())
    days = sorted({_day(record.finished_at) for record in records})
    codes = sorted({_short(record.code) for record in records})
    seconds = [sum(record.seconds.values()) for record in records]
    return [
        f"- {len(have)} of {len(benchmark.runs())} runs, on {', '.join(days)}, code {', '.join(codes)}, "
        f"device {', '.join(sorted({record.device for record in records}))}; "
        f"{statistics.mean(seconds):.0f} s of training a run; {records[0].n_series} {benchmark.evaluated_on} series."
    ]


def _short(code: str) -> str:
    """A commit in twelve digits, and whether files differed from it."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", code)


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def put_in_place(path: Path, name: str, text: str) -> None:
    """Replace a benchmark's section of the file, or append it; the rest stays as it is."""
    begin, end = f"<!-- benchmark {name} -->\n", f"<!-- end of benchmark {name} -->\n"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Benchmark results\n"
    block = begin + text + end
    if begin in before and end in before:
        head, _, rest = before.partition(begin)
        after = head + block + rest.partition(end)[2]
    else:
        after = before.rstrip("\n") + "\n\n" + block
    write_bytes(path, after.encode())
