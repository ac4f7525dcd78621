"""PLAsTiCC: light curves of a *simulated* survey of the sky, the complete training set.

7,848 objects of 14 classes, 1,421,705 observations in six bands at irregular times. The files are
those inside one version of a Python package; see ``package_file``. An observation is one token: its
positions are time and band, its values flux and error of the flux. Only these four columns are
read. The others tell or hint at the class (host galaxy, true parameters, total flux), and naming
one is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from roma_core.data.sources.columns import AxisColumn, ChannelColumn
from roma_core.data.sources.facts import FactColumns, ObjectTable
from roma_core.data.sources.package_file import (
    PackageFileConfig,
    PackageMember,
    Sha256,
    fetch_members,
)
from roma_core.data.sources.protocol import SourceConfig
from roma_core.data.sources.rows import TableColumns
from roma_core.data.sources.table import TableSource

BANDS = ("u", "g", "r", "i", "z", "y")

CLASSES = {
    "6": "microlensing",
    "15": "TDE",
    "16": "eclipsing binary",
    "42": "SN II",
    "52": "SN Iax",
    "53": "Mira",
    "62": "SN Ibc",
    "64": "kilonova",
    "65": "M-dwarf flare",
    "67": "SN Ia-91bg",
    "88": "AGN",
    "90": "SN Ia",
    "92": "RR Lyrae",
    "95": "SLSN-I",
}

_LEAKS = ("hostgal_", "true_", "tflux_", "distmod", "mwebv", "ra", "decl", "gal_", "ddf", "target")
_FOLDER = "snmachine/example_data/plasticc_train_"


class PlasticcConfig(SourceConfig):
    """The light curves, by default those in ``snmachine``."""

    kind: Literal["plasticc"] = "plasticc"
    package: str = "snmachine"
    version: str = "2.0.0.post3"
    wheel_sha256: Sha256 | None = "09faca95f69566b36a0d798ce01d24b25cc11367fb3b5323c4aa552421f715da"
    lightcurves: PackageMember = PackageMember(
        path=f"{_FOLDER}lightcurves.csv",
        sha256="da0efda0c6a3c6abec42dcab166ca18814be8597ee9f998e24e9792f6ca6998c",
    )
    metadata: PackageMember = PackageMember(
        path=f"{_FOLDER}metadata.csv",
        sha256="3d7fe4298e820244677437fe371c8b56cc8e3633dc8c196a9866aff427c88ee0",
    )
    channels: tuple[str, ...] = Field(
        ("flux", "flux_err"), min_length=1, description="Values of an observation."
    )
    citation: str = (
        "The PLAsTiCC team (2018), The Photometric LSST Astronomical Time-series Classification "
        "Challenge, arXiv:1810.00001: a simulated survey"
    )
    licence: str = "package BSD-3-Clause; public copies of the data state CC-BY-3.0"

    @field_validator("channels")
    @classmethod
    def _channels_tell_no_class(cls, channels: tuple[str, ...]) -> tuple[str, ...]:
        for name in channels:
            if name.startswith(_LEAKS):
                raise ValueError(
                    f"{name!r} gives the class away or hints at it, and is not known for a new "
                    f"object; use flux and flux_err"
                )
            if name not in ("flux", "flux_err"):
                raise ValueError(f"{name!r} is no channel of PLAsTiCC; there are flux and flux_err")
        return channels

    def open(self, cache: Path) -> TableSource:
        package = PackageFileConfig(
            package=self.package,
            version=self.version,
            wheel_sha256=self.wheel_sha256,
            members=(self.lightcurves, self.metadata),
        )
        paths = fetch_members(package, cache)
        columns = TableColumns(
            object="object_id",
            axes=(
                AxisColumn(column="mjd", name="time", unit="d"),
                AxisColumn(column="passband", name="band", unit=f"index of {', '.join(BANDS)}"),
            ),
            channels=tuple(ChannelColumn(column=name, unit="FLUXCAL") for name in self.channels),
            facts=FactColumns(label="target", classes=tuple(CLASSES.values()), class_names=CLASSES),
        )
        return TableSource(
            (paths[self.lightcurves.path],),
            columns,
            ObjectTable(file=paths[self.metadata.path], object="object_id"),
            {member.path: member.sha256 for member in (self.lightcurves, self.metadata)},
            cache,
            rows_at_once=1 << 18,
            citation=self.citation,
            licence=self.licence,
        )
