"""The ops: checks -> spec -> torch.library op or eager autograd -> dispatch; one file a family."""
