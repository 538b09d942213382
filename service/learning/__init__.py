"""Calibrators' lives: fits in a process of their own, revisions, activation."""
