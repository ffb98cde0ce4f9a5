"""A gcloud for tests: one queued resource at a time, on workers that are folders of this machine.

It is run as `gcloud` with FAKE_CLOUD naming a folder, where it keeps

    calls.jsonl      every call's words, in order
    script.json      {step: [what happens at its first call, at its second, ...]}; steps are create, delete, describe,
                     node, scp, setup, start, follow, stop, newest; past the end of a list all goes well
    slice.json       the queued resource, while there is one
    node             the node's state, if not READY; a running job may write it
    workers/N-W/     home of worker W of the N-th slice

What happens is a dict: `code` and `errors` end the call before it does anything, `state` and `reason` are what a
describe answers, `cut` ends an ssh after that many seconds (255, as a broken connection does), `seconds` makes it slow.
"""

import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path

# shutil and subprocess only where they are needed: most calls are questions, and each is a new process.

CLOUD = Path(os.environ["FAKE_CLOUD"])
SLICE = CLOUD / "slice.json"


def main(words: list) -> int:
    step = step_of(words)
    happening = note(words, step)
    time.sleep(happening.get("seconds", 0))
    if "code" in happening:
        print(happening.get("errors", f"ERROR: (gcloud) {step} failed"), file=sys.stderr)
        return happening["code"]
    if step == "create":
        return create(words)
    if step == "delete":
        return delete()
    if not SLICE.exists():
        return missing()
    if step == "describe":
        print(json.dumps(description(happening)))
    elif step == "node":
        print(node_state())
    elif step == "scp":
        return scp(words)
    else:
        return ssh(words, happening)
    return 0


def step_of(words: list) -> str:
    kind, verb = words[2:4]
    if verb == "ssh":
        found = re.search(r"/worker (\w+)", flag(words, "command"))
        return found[1] if found else "command"
    return "node" if (kind, verb) == ("tpu-vm", "describe") else verb


def note(words: list, step: str) -> dict:
    """Records the call; what the script has for it."""
    with open(CLOUD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(CLOUD / "calls.jsonl", "a") as calls:
            calls.write(json.dumps(words) + "\n")
        script = json.loads((CLOUD / "script.json").read_text())
        if not script.get(step):
            return {}
        happening = script[step].pop(0)
        (CLOUD / "script.partial").write_text(json.dumps(script))
        os.replace(CLOUD / "script.partial", CLOUD / "script.json")  # this process may be killed at any time
    return happening


def flag(words: list, name: str) -> str:
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return values[0] if values else ""


def missing() -> int:
    print("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found", file=sys.stderr)
    return 1


def create(words: list) -> int:
    if SLICE.exists():
        print("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: it exists", file=sys.stderr)
        return 1
    kind = flag(words, "accelerator-type")
    hosts = max(1, int(kind.split("-")[1]) // 8)  # of a v4
    slices = 1 + len({path.name.split("-")[0] for path in (CLOUD / "workers").glob("*")})
    for worker in range(hosts):
        (CLOUD / "workers" / f"{slices}-{worker}").mkdir(parents=True)
    (CLOUD / "node").unlink(missing_ok=True)
    SLICE.write_text(json.dumps({"slice": slices, "hosts": hosts, "kind": kind}))
    return 0


def delete() -> int:
    if not SLICE.exists():
        return missing()
    for home in homes():
        for pid in home.glob("speccascade/jobs/*/pid"):
            try:
                os.killpg(int(pid.read_text()), 9)
            except ProcessLookupError:
                continue
    SLICE.unlink()
    return 0


def homes() -> list:
    known = json.loads(SLICE.read_text())
    return [CLOUD / "workers" / f"{known['slice']}-{worker}" for worker in range(known["hosts"])]


def node_state() -> str:
    path = CLOUD / "node"
    return path.read_text().strip() if path.exists() else "READY"


def description(happening: dict) -> dict:
    state = {"state": happening.get("state", "SUSPENDED" if node_state() == "PREEMPTED" else "ACTIVE")}
    if "reason" in happening:
        state["failedData"] = {"error": {"message": happening["reason"]}}
    kind = json.loads(SLICE.read_text())["kind"]
    return {"state": state, "tpu": {"nodeSpec": [{"node": {"acceleratorType": kind}}]}}


def scp(words: list) -> int:
    import shutil

    source, target = words[4:6]
    if ":" in target:
        for home in homes():
            shutil.copy(source, home / target.partition(":")[2])
    else:
        shutil.copy(homes()[int(flag(words, "worker"))] / source.partition(":")[2], target)
    return 0


def ssh(words: list, happening: dict) -> int:
    if node_state() != "READY":
        print("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) the TPU is not READY", file=sys.stderr)
        return 1
    import subprocess

    running = [
        subprocess.Popen(
            ["bash", "-c", flag(words, "command")], cwd=home, stdin=subprocess.DEVNULL,
            start_new_session="cut" in happening,
            env={**os.environ, "HOME": str(home), "PATH": f"{CLOUD}/remote:{os.environ['PATH']}",
                 "FAKE_WORKER": home.name.split("-")[1]},
        )
        for home in homes()
    ]  # fmt: skip
    if "cut" in happening:
        time.sleep(happening["cut"])
        for process in running:
            os.killpg(process.pid, 9)
        print("client_loop: send disconnect: Broken pipe", file=sys.stderr)
        return 255
    codes = [process.wait() for process in running]
    for worker, code in enumerate(codes):
        if code:
            print(f"##### Command execution on worker {worker} failed with exit status {code}.", file=sys.stderr)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
