"""The commands that are plain functions; their arguments are the options of the command line."""
