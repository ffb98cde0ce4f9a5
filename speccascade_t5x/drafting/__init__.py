"""Who proposes: drafters, each reporting the law its tokens were really drawn from."""

from speccascade_t5x.drafting.model import ModelDrafter

__all__ = ["ModelDrafter"]
