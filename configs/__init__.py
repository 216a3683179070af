"""The presets, one YAML file per experiment."""
