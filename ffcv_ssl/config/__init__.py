"""Settings: the command line and YAML files -> frozen dataclasses, and messages for mistakes."""
