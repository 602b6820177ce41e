"""`python -m dop_fast.cli`, for torchrun."""

from dop_fast.cli.main import main

main()
