"""Real training runs, as users write them."""
