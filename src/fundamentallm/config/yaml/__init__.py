"""A YAML file: its lines, its problems, its edits, its differences."""
