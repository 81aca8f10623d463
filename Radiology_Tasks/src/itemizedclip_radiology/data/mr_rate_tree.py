"""Names of MR-RATE's series: STUDY_t1w-raw-axi.nii.gz, a further one of a kind STUDY_t1w-raw-axi-2.nii.gz."""

from __future__ import annotations

import re

_PLANES = {"axi": "AX_", "sag": "SAG_", "cor": "COR_", "obl": ""}
_SERIES = re.compile(
    r"(.*_)?(?P<kind>t1w|t2w|flair|swi|mra|[a-z0-9]+)-raw-(?P<plane>axi|sag|cor|obl)(-(?P<number>\d+))?"
)


def series_name(stem: str) -> str | None:
    """AX_T1W, SAG_FLAIR, AX_T1W_2 from a file's name without its ending; None for other names.

    An oblique series has no plane in its name: that in which its slices lie is put there when it is read.
    """
    match = _SERIES.fullmatch(stem)
    if match is None:
        return None
    number = f"_{match['number']}" if match["number"] else ""
    return f"{_PLANES[match['plane']]}{match['kind'].upper()}{number}"
