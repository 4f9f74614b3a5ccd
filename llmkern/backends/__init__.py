"""Kernel backends: one folder each, the same op modules in each (supports, forward, backward)."""
