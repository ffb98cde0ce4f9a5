"""A slice as a queued resource: asked for, waited for, watched, deleted.

Facts about the cloud used here, from its documentation: a queued resource is WAITING_FOR_RESOURCES (ACCEPTED before
2024), PROVISIONING, ACTIVE, FAILED, SUSPENDING or SUSPENDED; once preempted it is SUSPENDED and is never filled again,
so it has to be deleted and asked for anew; `delete --force` deletes its nodes first, which are what is billed; a
request that ended as FAILED or SUSPENDED still counts against the quota until it is deleted.
"""

from __future__ import annotations

import json
import re
import time
from typing import NamedTuple

from .gcloud import Gcloud
from .outcomes import LEFT_BEHIND, LaunchError, Refused, SliceLost

_GONE = "GONE"
_UNKNOWN = "UNKNOWN"  # the question itself failed: the laptop's network, most often
_DEAD_REQUESTS = {"SUSPENDING", "SUSPENDED", "DELETING", "FAILED", _GONE}
_DEAD_NODES = {"PREEMPTED", "TERMINATED", "STOPPING", "STOPPED", "DELETING", _GONE}
_DELETIONS = 6


class Accelerator(NamedTuple):
    """One `--accelerator-type`: on how many hosts it runs, and the software its machines start with."""

    name: str
    hosts: int
    runtime_version: str


# Generation: (cores or chips that its names count per host of a large slice, the most on a single host, software).
_GENERATIONS = {
    "v2": (8, 8, "tpu-ubuntu2204-base"),
    "v3": (8, 8, "tpu-ubuntu2204-base"),
    "v4": (8, 8, "tpu-ubuntu2204-base"),
    "v5litepod": (4, 8, "v2-alpha-tpuv5-lite"),
    "v5p": (8, 8, "v2-alpha-tpuv5"),
    "v6e": (4, 8, "v2-alpha-tpuv6e"),
}


def accelerator(name: str) -> Accelerator:
    """What is known of an accelerator type such as v4-32 or v5litepod-16.

    Raises:
      ValueError: no such generation, or a size that does not fill its hosts.
    """
    match = re.fullmatch(r"(\w+)-([1-9]\d*)", name)
    if not match or match[1] not in _GENERATIONS:
        raise ValueError(
            f"{name!r} is no accelerator type known here; they are called like "
            + ", ".join(f"{generation}-8" for generation in _GENERATIONS)
        )
    per_host, single_host, runtime_version = _GENERATIONS[match[1]]
    size = int(match[2])
    if size > single_host and size % per_host:
        raise ValueError(f"{name} does not fill its hosts: a multiple of {per_host} would")
    return Accelerator(name, 1 if size <= single_host else size // per_host, runtime_version)


class _Request(NamedTuple):
    """What the cloud says of a queued resource: its state, why it failed, what it asked for."""

    state: str
    reason: str = ""
    accelerator_type: str = ""


class Slice:
    """One queued resource with one node, both called `name`.

    Args:
      cloud: runs gcloud.
      name: of the queued resource and of its node.
      place: `--zone=...`, and `--project=...` where one was given.
      request: what `create` is asked for besides the name.
      wait_seconds: for how long at most a slice is waited for.
      poll_seconds: how often its state is asked for.
    """

    def __init__(
        self, cloud: Gcloud, name: str, place: list[str], request: list[str], wait_seconds: float, poll_seconds: float
    ):
        self.cloud = cloud
        self.name = name
        self.place = place
        self._request = request
        self._wait_seconds = wait_seconds
        self._poll_seconds = poll_seconds
        # Whether it may exist because of us. What somebody else made is never deleted.
        self.ours = False
        self.active = False

    def obtain(self, patient: bool) -> None:
        """Asks for the slice and waits until it is there.

        Args:
          patient: a refusal is not final but tried again until the time to wait is over; for a job that is under way.

        Raises:
          Refused: it is not to be had; the sentence says why.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            try:
                self._create()
                self._wait_until_active(deadline)
                return
            except SliceLost as lost:
                self.cloud.say(f"{self.name}: {lost}; asking again.")
            except Refused as refused:
                if not patient:
                    raise
                self.cloud.say(f"{refused} Asking again.")
            if time.monotonic() >= deadline:
                raise Refused(f"No {self.name} within {self._wait_seconds / 60:g} minutes.")
            if self.ours:
                self.delete()
            self.cloud.pause(self._poll_seconds)

    def adopt(self, accelerator_type: str) -> bool:
        """Takes over a slice of this name if there is one that works; False if there is none.

        Raises:
          Refused: there is one, but it has ended, is of another type, or its state cannot be learnt.
          SliceLost: it ended while it was waited for.
        """
        found = self._described()
        if found.state == _GONE:
            return False
        if found.state == _UNKNOWN:
            raise Refused(f"Whether {self.name} exists could not be learnt: {found.reason}")
        if found.state in _DEAD_REQUESTS:
            raise Refused(f"{self.name} exists but is {found.state}; --clean_up deletes it.")
        if found.accelerator_type not in ("", accelerator_type):
            raise Refused(f"{self.name} exists but is a {found.accelerator_type}, not a {accelerator_type}.")
        self.ours = True
        self._wait_until_active(time.monotonic() + self._wait_seconds)
        return True

    def check(self) -> None:
        """Raises SliceLost if the cloud says that the slice is gone; a question without an answer says nothing."""
        state = self._described().state
        if state in _DEAD_REQUESTS:
            raise SliceLost(f"the queued resource is {state}")
        node = self.node_state()
        if node in _DEAD_NODES:
            raise SliceLost(f"the node is {node}")

    def node_state(self) -> str:
        """READY, PREEMPTED, ..., GONE if there is no such node, or UNKNOWN if it could not be asked."""
        done = self.cloud.run(
            ["compute", "tpus", "tpu-vm", "describe", self.name, *self.place, "--format=value(state)"],
            quiet=True, assume="READY",
        )  # fmt: skip
        if done.code:
            return _GONE if done.not_found else _UNKNOWN
        return done.out.strip()

    def delete(self) -> None:
        """Deletes the request and its node, and makes sure that both are gone.

        Raises:
          LaunchError: they could not be deleted; the sentence is the command to try by hand.
        """
        self.active = False
        command = ["compute", "tpus", "queued-resources", "delete", self.name, *self.place, "--force", "--quiet"]
        for attempt in range(_DELETIONS):
            if attempt:
                self.cloud.pause(self._poll_seconds)
            done = self.cloud.run(command)
            if done.code and not done.not_found:
                self.cloud.say(f"{self.name} could not be deleted yet: {done.reason}")
            if self._described(assume=_GONE).state == _GONE:
                self.ours = False
                return
        raise LaunchError(
            f"{self.name} COULD NOT BE DELETED AND MAY STILL BE BILLED. Delete it by hand: gcloud {' '.join(command)}",
            LEFT_BEHIND,
        )

    def _create(self) -> None:
        command = ["compute", "tpus", "queued-resources", "create", self.name, f"--node-id={self.name}", *self.place]
        # A request that was sent cannot be unsent: a signal waits until it is known what became of it.
        with self.cloud.signals.held():
            self.ours, before = True, self.ours
            done = self.cloud.run([*command, *self._request, "--quiet"])
            if done.code and done.already_exists:
                self.ours = before
        if not done.code:
            return
        if done.already_exists and not self.ours:
            raise Refused(
                f"{self.name} exists already and was left alone: choose another name, continue on it with --reuse, "
                "or delete it with --clean_up."
            )
        raise Refused(f"{self.name} was refused: {done.reason}")

    def _wait_until_active(self, deadline: float) -> None:
        said = None
        while True:
            state, reason, _ = self._described()
            if state == "ACTIVE":
                self.active = True
                return
            if state == "FAILED":
                raise Refused(f"{self.name} could not be had: {reason or 'the request FAILED'}.")
            if state in _DEAD_REQUESTS:
                raise SliceLost(f"the queued resource is {state}")
            if state != said:
                self.cloud.say(f"{self.name} is {state}; waiting.")
                said = state
            if time.monotonic() >= deadline:
                raise Refused(f"{self.name} is still {state} after {self._wait_seconds / 60:g} minutes: given up.")
            self.cloud.pause(self._poll_seconds)

    def _described(self, assume: str = "ACTIVE") -> _Request:
        """The queued resource now; `assume` is the state that a dry run takes it to be in."""
        done = self.cloud.run(
            ["compute", "tpus", "queued-resources", "describe", self.name, *self.place, "--format=json"],
            quiet=True, assume=json.dumps({"state": {"state": assume}}),
        )  # fmt: skip
        if done.code:
            return _Request(_GONE if done.not_found else _UNKNOWN, done.reason)
        try:
            answer = json.loads(done.out)
            state = answer["state"]
            nodes = answer.get("tpu", {}).get("nodeSpec") or [{}]
            return _Request(
                state["state"],
                state.get("failedData", {}).get("error", {}).get("message", "").rstrip("."),
                nodes[0].get("node", {}).get("acceleratorType", ""),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return _Request(_UNKNOWN, "gcloud's answer was not understood")
