"""Who computes what in the next step: policy over pages and sequences, no tensors."""

from ktd.sched.scheduler import Scheduler, Work
from ktd.sched.sequence import Sequence

__all__ = ["Scheduler", "Sequence", "Work"]
