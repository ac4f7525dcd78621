"""What a build made, in a few lines: realised shares of the splits, and repairs."""

from __future__ import annotations

from roma_core.data.schema import Manifest


def in_words(manifest: Manifest) -> list[str]:
    """Lines for whoever built the set; shares are of all series."""
    total = sum(count.n_series for count in manifest.counts.values())
    shares = ", ".join(
        f"{split} {count.n_series:,} series ({count.n_series / total:.1%}) with "
        f"{count.n_observations:,} observations"
        for split, count in manifest.counts.items()
    )
    repaired = manifest.repairs.model_dump() if manifest.repairs else {}
    repairs = ", ".join(
        f"{name.replace('_', ' ')} {count:,}" for name, count in repaired.items() if count
    )
    return [shares, *([f"repaired: {repairs}"] if repairs else [])]
