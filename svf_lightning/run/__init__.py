"""What a run is: its directory, its settings and identity, its claims, its summary."""
