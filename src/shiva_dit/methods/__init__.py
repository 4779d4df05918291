"""One file per token-reduction method, on torch alone."""
