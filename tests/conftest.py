"""Settings of all tests."""

import os

# On Intel processors MKL's last bits depend on where an array lies, unless it is told otherwise:
# tests that compare to the bit would fail by chance. It is read at the first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
from hypothesis import settings

# Tiny models are about ten times faster on one thread than on many.
torch.set_num_threads(1)

# Without a GPU Triton's kernels run in its interpreter, if that is known when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("shiva_dit", deadline=None, print_blob=True)
settings.load_profile("shiva_dit")
