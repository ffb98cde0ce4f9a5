"""Who proposes: drafters, each reporting the law its tokens were really drawn from."""

from speccascade_t5x.drafting.model import ModelDrafter
from speccascade_t5x.drafting.stop import Confidence, Deferral, DraftStop, Entropy

__all__ = ["Confidence", "Deferral", "DraftStop", "Entropy", "ModelDrafter"]
