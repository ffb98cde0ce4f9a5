"""A gcloud for tests: one queued resource at a time, on workers that are folders of this machine.

It is run as `gcloud` with FAKE_CLOUD naming a folder, where it keeps

    calls.jsonl      every call's words, in order
    script.json      {step: [what happens at its first call, at its second, ...]}; steps are create, delete, describe,
                     node, scp, setup, start, follow, stop, newest; past the end of a list all goes well
    slice.json       the queued resource, while there is one
    node             the node's state, if not READY; a running job may write it
    workers/N-W/     home of worker W of the N-th slice

What happens is a dict: `code` and `errors` end the call before it does anything, `state` and `reason` are what a
describe answers, `cut` ends an ssh after that many seconds (255, as a broken connection does), `seconds` makes it slow,
and so does `late` a create, which is served whatever becomes of the caller.
"""

import fcntl
import json
import os
import sys
import time

# More is imported only where it is needed: most calls are questions, and each is a new process.

CLOUD = os.environ["FAKE_CLOUD"]
SLICE = f"{CLOUD}/slice.json"


def main(words: list) -> int:
    step = step_of(words)
    happening = note(words, step)
    time.sleep(happening.get("seconds", 0))
    if "code" in happening:
        print(happening.get("errors", f"ERROR: (gcloud) {step} failed"), file=sys.stderr)
        return happening["code"]
    if step == "create":
        return late_create(words, happening["late"]) if "late" in happening else create(words)
    if step == "delete":
        return delete()
    if not os.path.exists(SLICE):
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
        found = [part.split()[0] for part in flag(words, "command").split("/worker ")[1:]]
        return found[-1] if found else "command"
    return "node" if (kind, verb) == ("tpu-vm", "describe") else verb


def note(words: list, step: str) -> dict:
    """Records the call; what the script has for it."""
    with open(f"{CLOUD}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{CLOUD}/calls.jsonl", "a") as calls:
            calls.write(json.dumps(words) + "\n")
        script = json.loads(read(f"{CLOUD}/script.json"))
        if not script.get(step):
            return {}
        happening = script[step].pop(0)
        with open(f"{CLOUD}/script.partial", "w") as rest:
            json.dump(script, rest)
        os.replace(f"{CLOUD}/script.partial", f"{CLOUD}/script.json")  # this process may be killed at any time
    return happening


def read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def flag(words: list, name: str) -> str:
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return values[0] if values else ""


def missing() -> int:
    print("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found", file=sys.stderr)
    return 1


def late_create(words: list, seconds: float) -> int:
    """The request is on its way, and is served even if the one who sent it is gone."""
    server = os.fork()
    if not server:
        os.setsid()
        time.sleep(seconds)
        os._exit(create(words))
    return os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])


def create(words: list) -> int:
    if os.path.exists(SLICE):
        print("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: it exists", file=sys.stderr)
        return 1
    kind = flag(words, "accelerator-type")
    hosts = max(1, int(kind.split("-")[1]) // 8)  # of a v4
    os.makedirs(f"{CLOUD}/workers", exist_ok=True)
    slices = 1 + len({name.split("-")[0] for name in os.listdir(f"{CLOUD}/workers")})
    for worker in range(hosts):
        os.mkdir(f"{CLOUD}/workers/{slices}-{worker}")
    if os.path.exists(f"{CLOUD}/node"):
        os.unlink(f"{CLOUD}/node")
    with open(SLICE, "w") as file:
        json.dump({"slice": slices, "hosts": hosts, "kind": kind}, file)
    return 0


def delete() -> int:
    import glob

    if not os.path.exists(SLICE):
        return missing()
    for home in homes():
        for pid in glob.glob(f"{home}/speccascade/jobs/*/pid"):
            try:
                os.killpg(int(read(pid)), 9)
            except ProcessLookupError:
                continue
    os.unlink(SLICE)
    return 0


def homes() -> list:
    known = json.loads(read(SLICE))
    return [f"{CLOUD}/workers/{known['slice']}-{worker}" for worker in range(known["hosts"])]


def node_state() -> str:
    return read(f"{CLOUD}/node").strip() if os.path.exists(f"{CLOUD}/node") else "READY"


def description(happening: dict) -> dict:
    state = {"state": happening.get("state", "SUSPENDED" if node_state() == "PREEMPTED" else "ACTIVE")}
    if "reason" in happening:
        state["failedData"] = {"error": {"message": happening["reason"]}}
    kind = json.loads(read(SLICE))["kind"]
    return {"state": state, "tpu": {"nodeSpec": [{"node": {"acceleratorType": kind}}]}}


def scp(words: list) -> int:
    import shutil

    source, target = words[4:6]
    if ":" in target:
        for home in homes():
            shutil.copy(source, f"{home}/{target.partition(':')[2]}")
    else:
        shutil.copy(f"{homes()[int(flag(words, 'worker'))]}/{source.partition(':')[2]}", target)
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
            env={**os.environ, "HOME": home, "PATH": f"{CLOUD}/remote:{os.environ['PATH']}",
                 "FAKE_WORKER": home.rpartition("-")[2]},
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
