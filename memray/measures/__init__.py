"""Measures: pure functions from scores to numbers. They know nothing of models, files or trackers.

Arithmetic is in float64. An undefined value is nan and never infinite, so that whatever comes out can be
logged.
"""
