"""Evaluation: one file for each question."""
