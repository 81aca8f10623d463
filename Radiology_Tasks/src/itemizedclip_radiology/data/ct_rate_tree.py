"""Names and places of CT-RATE's files.

A volume name is <split>_<patient>_<scan letters>_<reconstruction>, with or without .nii.gz; its file lies at
ROOT/<split>/<split>_<patient>/<split>_<patient>_<scan letters>/<volume name>.pt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from itemizedclip.runtime.errors import UserError

_VOLUME = re.compile(r"(?P<split>train|valid)_(?P<patient>\d+)_(?P<scan>[a-z]+)_(?P<recon>\d+)(\.nii\.gz|\.nii|\.pt)?")
_SCAN = re.compile(r"(train|valid)_\d+_[a-z]+")

EXCLUDED_RECONSTRUCTIONS = frozenset({"train_1267_a_4", "train_11755_a_3", "train_11755_a_4"})
"""Left out by the published code, which gives no reason; all three have labels."""


@dataclass(frozen=True)
class VolumeName:
    """One reconstruction of one scan."""

    split: str
    patient: int
    scan_letters: str
    reconstruction: int

    @property
    def stem(self) -> str:
        """For example valid_1_a_2."""
        return f"{self.scan}_{self.reconstruction}"

    @property
    def scan(self) -> str:
        """For example valid_1_a; reports are per scan."""
        return f"{self.split}_{self.patient}_{self.scan_letters}"

    @property
    def path(self) -> Path:
        """The volume's file below the data folder."""
        return Path(self.split, f"{self.split}_{self.patient}", self.scan, f"{self.stem}.pt")


def parse_volume_name(name: str) -> VolumeName:
    """The parts of a volume name.

    Raises:
        ValueError: not a CT-RATE volume name.
    """
    match = _VOLUME.fullmatch(name.strip())
    if not match:
        raise UserError(f"{name!r}; expected a CT-RATE volume name such as valid_1_a_2.nii.gz")
    return VolumeName(match["split"], int(match["patient"]), match["scan"], int(match["recon"]))


def is_scan_name(name: str) -> bool:
    """Whether a name is that of a scan, such as train_12_b."""
    return _SCAN.fullmatch(name) is not None
