"""Records of cells → the rows' tables, in their place in a Markdown file."""

from __future__ import annotations

import datetime
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from roma_core.files import write_bytes
from tests.benchmarks.results.benchmarks import Benchmark, Reference, Run
from tests.benchmarks.results.runs import Record

# also with something before or after: clean_rmse, mse_24_hz, log_loss
_LOWER_IS_BETTER = re.compile(r"(^|_)(n?r?mse|mae|loss|calibration_error)(_|$)")


def row_text(row: Benchmark, records: Mapping[Run, Record], outdated: frozenset[Run]) -> str:
    """A row's section: protocol, command, a table, and what stands behind it.

    Args:
        outdated: cells whose record was made with settings that are no longer the experiment's.
    """
    have = {cell: records[cell] for cell in row.cells() if cell in records}
    lines = [
        f"### {row.name}",
        "",
        row.protocol,
        "",
        f"    python -m tests.benchmarks.results {row.name}",
        "",
    ]
    lines += _table(row, have)
    lines.append("")
    lines += [_anchor(anchor) for anchor in row.anchors]
    lines += _made(row, have)
    if stale := sorted(cell.name for cell in have if cell in outdated):
        lines.append(f"- Made with earlier settings of the experiment: {', '.join(stale)}.")
    return "\n".join(lines) + "\n"


def _table(row: Benchmark, have: Mapping[Run, Record]) -> list[str]:
    head = ["case", "metric", "here", *(anchor.name for anchor in row.anchors), "ahead of all"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    for case in row.cases:
        for metric in row.metrics:
            found = [
                record.metrics[metric]
                for cell, record in have.items()
                if cell.case == case.name and metric in record.metrics
            ]
            others = [anchor.values.get(metric, {}).get(case.name) for anchor in row.anchors]
            cells = [case.name, metric.replace("_", " "), _ours(found, len(row.seeds))]
            cells += ["–" if other is None else f"{other:g}" for other in others]
            rivals = [
                other
                for anchor, other in zip(row.anchors, others, strict=True)
                if other is not None and not anchor.is_bound
            ]
            cells.append(_ahead(found, rivals, metric))
            lines.append("| " + " | ".join(cells) + " |")
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


def _ahead(found: Sequence[float], others: Sequence[float], metric: str) -> str:
    if not found or not others:
        return "–"
    ours = statistics.mean(found)
    if _LOWER_IS_BETTER.search(metric):
        margin = min(others) - ours
    else:
        margin = ours - max(others)
    return f"{'yes' if margin > 0 else 'no'}, {'+' if margin >= 0 else '-'}{_figure(abs(margin))}"


def _anchor(anchor: Reference) -> str:
    like = "like for like" if anchor.like_for_like else "not like for like"
    return f"- {anchor.name}: {anchor.source}; {like}."


def _made(row: Benchmark, have: Mapping[Run, Record]) -> list[str]:
    if not have:
        return ["- Not run yet."]
    records = list(have.values())
    days = sorted({_day(record.finished_at) for record in records})
    codes = sorted({_short(record.code) for record in records})
    seconds = [sum(record.seconds.values()) for record in records]
    return [
        f"- {len(have)} of {len(row.cells())} cells, on {', '.join(days)}, code {', '.join(codes)}, "
        f"device {', '.join(sorted({record.device for record in records}))}; "
        f"{statistics.mean(seconds):.0f} s of training a cell; {records[0].n_series} {row.judged_on} series."
    ]


def _short(code: str) -> str:
    """A commit in twelve digits, and whether files differed from it."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", code)


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def put_in_place(path: Path, name: str, text: str) -> None:
    """Replace a row's section of the file, or append it; the rest stays as it is."""
    begin, end = f"<!-- row {name} -->\n", f"<!-- end of row {name} -->\n"
    before = path.read_text(encoding="utf-8") if path.exists() else "# Benchmark results\n"
    block = begin + text + end
    if begin in before and end in before:
        head, _, rest = before.partition(begin)
        after = head + block + rest.partition(end)[2]
    else:
        after = before.rstrip("\n") + "\n\n" + block
    write_bytes(path, after.encode())
