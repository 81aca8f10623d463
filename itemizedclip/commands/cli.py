"""The command `itemizedclip`: one subcommand per thing a user does.

itemizedclip train      train a recipe by its name: the published ones, or one on your own images
itemizedclip prepare    reports or redundant captions → independent text items
itemizedclip demo       train on itemized scenes, evaluate, draw where each item looked
itemizedclip calibrate  probabilities, thresholds and conformal sets of findings, fitted on patients of their own
itemizedclip compare    objectives against each other on the same data, seed by seed
itemizedclip index      encode a folder of images once, so that search finds them
itemizedclip search     find images of an index by text, and where each text looked
itemizedclip report     one image or study and where each of its items looked, as one HTML file
itemizedclip explain    the same as pictures and NIfTI volumes, or as numbers over a set
itemizedclip convert    a checkpoint in another layout
itemizedclip push       a model, its config and its card to the Hugging Face hub
itemizedclip pull       a model from the hub
itemizedclip export     a model as ONNX graphs, for programs without PyTorch
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from itemizedclip.runtime.flags import ending_quietly

COMMANDS = {
    "train": ("itemizedclip.commands.train", "train a recipe by its name: the published ones, or your own images"),
    "prepare": ("itemizedclip.commands.prepare", "scans → volumes, reports or captions → items: what training reads"),
    "demo": (
        "itemizedclip.commands.demo",
        "train on the embedded itemized scenes, evaluate, draw an attention picture",
    ),
    "evaluate": ("itemizedclip.commands.evaluate", "a checkpoint on a named benchmark; --help lists them"),
    "calibrate": (
        "itemizedclip.commands.calibrate",
        "probabilities, thresholds and conformal sets of findings, stored beside the checkpoint",
    ),
    "compare": ("itemizedclip.commands.compare", "objectives against each other on the same data, seed by seed"),
    "index": ("itemizedclip.commands.index", "encode a folder of images once, so that search finds them"),
    "search": ("itemizedclip.commands.search", "find images of an index by text, and where each text looked"),
    "report": (
        "itemizedclip.commands.report",
        "one image or study and where each of its items looked, as one HTML file",
    ),
    "explain": ("itemizedclip.commands.explain", "the same as pictures and NIfTI volumes, or as numbers over a set"),
    "convert": (
        "itemizedclip.commands.convert",
        "a checkpoint in another layout: safetensors and config, or as released",
    ),
    "push": ("itemizedclip.commands.push", "a model, its config and its card to the Hugging Face hub"),
    "pull": ("itemizedclip.commands.pull", "a model from the Hugging Face hub"),
    "export": ("itemizedclip.commands.export", "a model as ONNX graphs, for programs without PyTorch"),
}
"""Name → (module with `main(argv)`, one line for --help)."""


def usage() -> str:
    """The text of `itemizedclip --help`."""
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: itemizedclip COMMAND [flags]        itemizedclip COMMAND --help",
            "",
            "commands:",
            *lines,
            "",
            "The scripts of the project folder (train_*.sh, inference_*.sh) are the same under their published names.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; exits 2 with the list of commands when there is no such one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["--help"], ["-h"]):
        with ending_quietly():
            print(usage())
        return
    if not arguments or arguments[0] not in COMMANDS:
        problem = f"no command named {arguments[0]}" if arguments else "no command given"
        print(f"itemizedclip: {problem}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    module, _ = COMMANDS[arguments[0]]
    with ending_quietly():
        importlib.import_module(module).main(arguments[1:])


if __name__ == "__main__":
    main()
