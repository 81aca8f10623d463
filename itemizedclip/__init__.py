"""ItemizedCLIP: vision–language training on images that carry several independent text items.

    import itemizedclip as ic

    loaded = ic.load("epoch_24.pt")
    scores = ic.score(loaded, ["scan.nii.gz"], ["acute stroke", "meningioma"])
    explanation = ic.explain(loaded, "scan.nii.gz", ["acute stroke"])

Everything below is found here; nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itemizedclip.api import (
        calibrated,
        create_model_and_transforms,
        evaluate,
        explain,
        list_benchmarks,
        list_models,
        list_recipes,
        load,
        open_index,
        score,
        train,
    )

    __version__: str

__all__ = [
    "__version__",
    "calibrated",
    "create_model_and_transforms",
    "evaluate",
    "explain",
    "list_benchmarks",
    "list_models",
    "list_recipes",
    "load",
    "open_index",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("itemizedclip")
    if name in __all__:
        return getattr(import_module("itemizedclip.api"), name)
    raise AttributeError(f"module 'itemizedclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
