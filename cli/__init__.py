"""The command line, `dopfast`."""
