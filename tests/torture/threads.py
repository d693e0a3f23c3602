"""Threads: many short-lived loaders, and delays where they hurt most."""
