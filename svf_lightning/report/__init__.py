"""What a run looks like: figures and, around them, the report."""
