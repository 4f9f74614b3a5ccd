"""The suites: lists of cases. Adding a case is adding a line."""
