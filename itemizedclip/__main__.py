"""`python -m itemizedclip` is the command `itemizedclip`; torchrun starts it by this name."""

from itemizedclip.commands.cli import main

if __name__ == "__main__":
    main()
