"""Settings of all tests."""

import torch
from hypothesis import settings

# Tiny models are about ten times faster on one thread than on many.
torch.set_num_threads(1)

settings.register_profile("shiva_dit", deadline=None, print_blob=True)
settings.load_profile("shiva_dit")
