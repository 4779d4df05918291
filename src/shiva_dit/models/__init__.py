"""The seam to diffusers: what a block takes and returns, and hooks on and off."""
