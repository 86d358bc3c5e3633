"""Kinds of work: the data, models and metrics of each."""
