"""The ops: checks -> spec -> torch.library op or eager autograd -> dispatch. One file an op family."""
