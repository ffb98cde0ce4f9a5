"""The table of TPU slices: every spelling of a name, and sizes as the clouds' documentation has them."""

from __future__ import annotations

import pytest

from speccascade_t5x.distributed import slices
from speccascade_t5x.interfaces import UserError


@pytest.mark.parametrize(
    ("names", "chips", "devices", "hosts", "accelerator"),
    [
        (("v2-8", "v2:2x2"), 4, 8, 1, "v2-8"),
        (("v3-32", "v3_32", "v3:4x4"), 16, 32, 4, "v3-32"),
        (("v4-8", "v4_8", "v4:2x2x1"), 4, 4, 1, "v4-8"),
        (("v4-16", "v4:2x2x2"), 8, 8, 2, "v4-16"),
        (("v4-32", "v4:2x2x4"), 16, 16, 4, "v4-32"),
        (("v4-128", "v4:4x4x4"), 64, 64, 16, "v4-128"),
        (("v5p-16", "v5p:2x2x2"), 8, 8, 2, "v5p-16"),
        (("v5e-1", "v5e:1x1", "v5litepod-1"), 1, 1, 1, "v5litepod-1"),
        (("v5e-8", "v5litepod-8", "v5litepod_8", "v5e:2x4"), 8, 8, 1, "v5litepod-8"),
        (("v5e-16", "v5e_16", "v5e:4x4"), 16, 16, 4, "v5litepod-16"),
        (("v6e-8", "v6e:2x4"), 8, 8, 1, "v6e-8"),
        (("v6e-32", "v6e:4x8"), 32, 32, 8, "v6e-32"),
    ],
)
def test_a_slice(names, chips, devices, hosts, accelerator):
    """Numbers of Cloud TPU's documentation, "TPU configurations" of each generation."""
    (found,) = {slices.named(name) for name in names}
    assert (found.chips, found.devices, found.hosts, found.accelerator_type) == (chips, devices, hosts, accelerator)


def test_names_are_unique_and_lead_back():
    assert len({each.short_name for each in slices.SLICES}) == len(slices.SLICES)
    for each in slices.SLICES:
        for name in (each.name, each.short_name, each.accelerator_type, each.short_name.replace("-", "_")):
            assert slices.named(name) is each


@pytest.mark.parametrize("name", ["v4-12", "v4:2x2x3", "v4", "v4-2x2x1", "h100-8", "", "v4:8", "V4-8"])
def test_what_is_no_slice(name):
    with pytest.raises(
        UserError, match="there is no TPU slice '.*': (did you mean 'v|known are v2-128, .*, v5e-16)"
    ) as caught:
        slices.named(name)
    assert "\n" not in str(caught.value)
