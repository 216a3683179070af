"""Pages: HTML around the figures of a run, of a sweep, of several runs."""
