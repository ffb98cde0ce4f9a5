"""The parts of scripts/tpu/launch. Standard library only, Python 3.9 or newer: it runs on laptops as they are."""
