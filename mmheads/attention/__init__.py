"""Record where heads look, ablate them, and measure what a change of their output does.

One attention function is registered beside the stock ones (`hook`). Recording (`recording`) and
interventions (`interventions`) are attached to it layer by layer, inside of a `with` block.
"""

from mmheads.attention.hook import check_heads, stop_after
from mmheads.attention.interventions import MODES, WHEN, ablate, gate, mean_outputs
from mmheads.attention.recording import Recording, record_keys, record_mass
from mmheads.attention.sharing import ablate_rows, can_share

__all__ = [
    "MODES",
    "WHEN",
    "Recording",
    "ablate",
    "ablate_rows",
    "can_share",
    "check_heads",
    "gate",
    "mean_outputs",
    "record_keys",
    "record_mass",
    "stop_after",
]
