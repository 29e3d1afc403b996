"""`python -m memray`; there is no console script, because a profiler owns the command of that name."""

from memray.cli import main

main()
