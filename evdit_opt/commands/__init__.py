"""The subcommands of ``evdit``, one file each; ``cli.py`` puts them together."""
