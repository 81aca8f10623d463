"""Running the project's scripts and commands as users do, and reading what they say when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT_VARIABLES = (
    "DATA_ROOT", "JSON_ROOT", "ITEMS_JSON", "RSICD_DIR", "RSICD_ITEMS", "TRAIN_SHARDS", "VAL_SHARDS", "COCO_DIR",
    "FLICKR_DIR", "CT_RATE_LABELS", "TEXT_MODEL", "IMAGE_WEIGHTS", "SERIES_NAME_WEIGHTS", "RESUME", "LOGS", "GPUS",
    "PYTHON",
)  # fmt: skip
"""What the scripts of the project folder read from the environment."""


def run(*command: str, cwd: Path | str = "/", **variables: str) -> subprocess.CompletedProcess:
    """A command with these environment variables and no others of the scripts' own."""
    environment = {k: v for k, v in os.environ.items() if k not in SCRIPT_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


def fails(capsys: pytest.CaptureFixture[str], function: Callable[..., Any], *arguments: Any) -> str:
    """The message, in one line, of a command that must end with one and without a trace."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code not in (0, None)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return " ".join(message.split())
