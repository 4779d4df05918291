"""What a server of worker processes imports, once for all that it forks (`ranks.server`).

They look at few held-out images.
"""

from shiva_dit.demo import digits
from shiva_dit.experiments import held_out, worker
from tests import conftest, distributed, test_composition

__all__ = ["conftest", "digits", "distributed", "test_composition", "worker"]

held_out.NUM_TIMES, held_out.IMAGES_PER_TIME = 4, 8
