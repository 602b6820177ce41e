"""One module for each command; its function carries the same name."""
