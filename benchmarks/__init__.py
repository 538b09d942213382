"""Measurements; see each file. Nothing here is asserted in a test."""
