"""speccascade_t5x."""
