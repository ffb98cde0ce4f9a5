"""Several hosts, one process each: how work is shared, and how the hosts agree on small values.

No arrays are moved here. Small values go through the key-value store of JAX's coordination service, which runs in the
process of host 0; records and cells go through a folder that all hosts see. The heartbeats of that service detect a
host that dies, and the service then ends every other process; `cli.host_processes` reports that in one sentence.

Decoding needs no communication between teams: each *team* has a mesh of its own and a share of the batches. A team is
one host or, if the weights need more devices than a host has, the smallest number of hosts that hold them. The hosts of
a team run the same programs on the same batches, and its first host writes. Training has one mesh over all devices.

    +-- team 0 --+  +-- team 1 --+
    | host 0, 1  |  | host 2, 3  |    4 hosts of 4 devices, model=8
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import distributed  # JAX has no public name for the service's key-value store

from speccascade_t5x.distributed.partitioning import Partitioning, Topology
from speccascade_t5x.interfaces import UserError

# How long hosts wait for each other before one is taken to hang: longer than any host works alone while the others wait
# (wall times of a sweep, metrics that run programs). A dead host is detected much sooner, see `cli.host_processes`.
PATIENCE_S = 6 * 3600.0
LOST = "another host of this job has stopped, so this one stops too; the same command, on every host, continues"
_SHARED_S = 15.0  # until a file that one host wrote is seen by the others
_PREFIX = "speccascade"


class HostLost(Exception):
    """Another host has died or hangs. The files on disk are complete; the same command continues."""


class Preempted(Exception):
    """The job was told to stop. The files on disk are complete; the same command continues it."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of this job, seen from one of them.

    Attributes:
      index: index of this host.
      count: number of hosts.
      patience_s: how long to wait for the others, in seconds.
    """

    index: int = 0
    count: int = 1
    patience_s: float = PATIENCE_S

    @property
    def first(self) -> bool:
        """Whether this host writes the files that are written once per job."""
        return self.index == 0

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """Waits until all hosts have called this, and returns the values of all hosts, in the order of the hosts.

        Args:
          what: name of this barrier, also in messages; every host calls it once per job.
          value: a small value of JSON types.

        Raises:
          HostLost: a host did not call it in time.
        """
        if self.count == 1:
            return [value]
        self._set(f"{what}/{self.index}", value)
        return [self._get(f"{what}/{i}", what, i) for i in range(self.count)]

    def wait(self, what: str) -> None:
        """Waits until all hosts have called this; see `gather`."""
        self.gather(what)

    def share(self, what: str, value: Any = None) -> Any:
        """The value of host 0; the others wait for it, and host 0 waits for no one. See `gather`."""
        if self.count == 1:
            return value
        if self.first:
            self._set(what, value)
        return self._get(what, what, 0)

    def announce(self, what: str, value: Any) -> None:
        """Publishes a value to all hosts; only the first value counts."""
        try:
            self._set(what, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def announced(self, what: str) -> Any:
        """The published value, or None."""
        try:
            return json.loads(_client().key_value_try_get(f"{_PREFIX}/{what}"))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def see(self, there: Callable[[], bool], what: object) -> None:
        """Waits until this host sees a file that another has written; network file systems take some seconds for that.

        Args:
          there: returns whether the file is visible.
          what: name of the file in the message.

        Raises:
          UserError: the file does not appear, so the folder is not shared.
        """
        give_up = time.monotonic() + _SHARED_S
        while self.count > 1 and not there():
            if time.monotonic() > give_up:
                raise UserError(
                    f"host {self.index} does not see {what}, which another host has written: the output folder must be "
                    "one that all hosts share, such as NFS or a mounted bucket"
                )
            time.sleep(0.2)

    def _set(self, key: str, value: Any) -> None:
        _client().key_value_set(f"{_PREFIX}/{key}", json.dumps(value))

    def _get(self, key: str, what: str, host: int) -> Any:
        try:
            found = _client().blocking_key_value_get(f"{_PREFIX}/{key}", int(self.patience_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise HostLost(LOST) from error
            raise HostLost(
                f"host {host} did not reach {what!r} within {self.patience_s:g} s, so this host stops; what was "
                "finished is kept, and the same command, on every host, continues"
            ) from error
        return json.loads(found)


def current() -> Hosts:
    """The hosts of this process's job: a single one, unless `jax.distributed` was initialised."""
    state = distributed.global_state
    return Hosts() if state.client is None else Hosts(state.process_id, state.num_processes)


def _client() -> Any:
    return distributed.global_state.client


@dataclasses.dataclass(frozen=True)
class Team:
    """The hosts that decode the same batches.

    Attributes:
      hosts: the hosts of the job.
      members: indices of the hosts of the team.
    """

    hosts: Hosts
    members: tuple[int, ...]

    @property
    def leads(self) -> bool:
        """Whether this host writes the outputs of its team."""
        return self.hosts.index == self.members[0]

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """The share of this team: every n-th item."""
        size = len(self.members)
        return list(items[self.members[0] // size :: self.hosts.count // size])


def team(layout: Partitioning | None, of: Hosts | None = None) -> Team:
    """The team whose mesh this is; None is one device of this host."""
    of = of or current()
    if layout is None or of.count == 1:
        return Team(of, (of.index,))
    return Team(of, tuple(sorted({device.process_index for device in layout.mesh.devices.flat})))


def partitioning(topology: Topology) -> Partitioning:
    """The mesh of this host's team: `topology` itself for one host, else the team's part of it.

    Raises:
      UserError: the errors of `Topology.mesh`; the mesh does not take all devices of all hosts, or a group fills
        neither a part of a host nor whole hosts.
    """
    here = current()
    if here.count == 1:
        return topology.partitioning()
    own, total, model = jax.local_device_count(), jax.device_count(), topology.model
    size = max(1, model // own)
    if (own % model and model % own) or here.count % size:
        raise UserError(
            f"groups of model={model} devices fill neither a part of a host of {own} devices nor whole ones of the "
            f"{here.count} hosts: choose a model that divides {own}, or a multiple of it"
        )
    check_whole(total if topology.data is None else topology.data * model)
    if topology.devices not in (None, total):
        raise UserError(f"the topology has {topology.devices} devices, and the {here.count} hosts have {total}")
    begin = here.index // size * size
    devices = [device for device in jax.devices() if begin <= device.process_index < begin + size]
    mine = dataclasses.replace(topology, devices=len(devices), data=len(devices) // model)
    return mine.partitioning(devices)


def check_whole(devices: int) -> None:
    """Checks that a mesh over several hosts takes all their devices.

    Raises:
      UserError: there are more than `devices` devices on several hosts.
    """
    total = jax.device_count()
    if current().count > 1 and devices != total:
        raise UserError(f"a mesh over several hosts must take all their {total} devices, not {devices}")


class StopInDecoding:
    """Whether to stop before the next batch: all hosts stop once one of them was told to.

    The hosts of a team must stop at the same batch, so the first one decides for the others.
    """

    def __init__(self, mine: Team, told: Callable[[], bool]):
        self._team, self._hosts, self._told, self._asked = mine, mine.hosts, told, 0

    def __call__(self) -> bool:
        if self._hosts.count == 1:
            return self._told()
        if self._told():
            self._hosts.announce("stop", True)
        if len(self._team.members) == 1:
            return bool(self._hosts.announced("stop"))
        self._asked += 1
        key = f"stop/{self._team.members[0]}/{self._asked}"
        if self._team.leads:
            self._hosts.announce(key, bool(self._hosts.announced("stop")))
        return self._hosts._get(key, "the next batch", self._team.members[0])


class StopInTraining:
    """Whether to stop after a step: all hosts stop at the same step, some steps after one of them was told to.

    Args:
      hosts: the hosts of the job.
      told: whether this host was told to stop.
      ahead: by how many steps a host may be ahead of another.
    """

    def __init__(self, hosts: Hosts, told: Callable[[], bool], ahead: int):
        self._hosts, self._told, self._ahead = hosts, told, ahead

    def __call__(self, step: int) -> bool:
        if self._hosts.count == 1:
            return self._told()
        if self._told():
            self._hosts.announce("stop", step + self._ahead + 1)
        last = self._hosts.announced("stop")
        return last is not None and step >= last
