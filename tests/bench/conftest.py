"""Nothing here is a test: `--doctest-modules` would otherwise import every benchmark."""

collect_ignore_glob = ["*.py"]
