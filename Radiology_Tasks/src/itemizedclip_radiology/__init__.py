"""What every domain of the radiology wing shares; every script of the wing imports it before its other packages."""

import importlib.util
import sys
from pathlib import Path

_PACKAGES = ("timm", "transformers", "tokenizers", "nibabel", "SimpleITK", "pydicom")

_missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
if _missing:
    _message = (
        f"studies need packages that are not installed ({', '.join(_missing)}): "
        f"run {sys.executable} -m pip install -e '.[radiology]' in the project folder"
    )
    # A program of this wing ends with one line; whoever only looks which models there are catches the error.
    _program = Path(sys.argv[0]).resolve() if sys.argv and sys.argv[0] else Path()
    # "-m" stands there while Python imports the package of the module it was asked to run.
    if sys.argv[:1] == ["-m"] or _program.is_relative_to(Path(__file__).resolve().parents[1]):
        print(f"error: {_message}", file=sys.stderr)
        raise SystemExit(1)
    raise ModuleNotFoundError(_message, name=_missing[0])
