__version__ = "1.0.1"  # CHANGELOG.md says what is in it; pyproject.toml and run.json read it
