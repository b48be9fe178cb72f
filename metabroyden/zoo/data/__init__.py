"""Data sets, one source a file. Nothing here downloads."""
