"""Factories of cases, one file an op. The suites are lists of calls of these."""
