"""The command `itemizedclip pull` (`itemizedclip.commands.share`)."""

from itemizedclip.commands.share import main_pull as main

__all__ = ["main"]
