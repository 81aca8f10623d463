"""The command `itemizedclip push` (`itemizedclip.commands.share`)."""

from itemizedclip.commands.share import main_push as main

__all__ = ["main"]
