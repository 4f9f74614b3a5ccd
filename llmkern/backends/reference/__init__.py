"""Plain torch, on every device and in float64: what the other backends are checked against."""
