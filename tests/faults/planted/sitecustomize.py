"""Only on the path of a campaign's jobs: kills ranks at a planned call of a chosen function, and notes rows trained on.

PREFOPT_FAULTS are the plans: [{"target": "module:Class.function", "call": n, "before": bool, "at": rank, "who": …}];
when rank `at` makes its n-th call of the function, `who` dies by SIGKILL, before the call or after it: "self" that
rank, "other" the other ranks (where there is none, itself), "all" the ranks, torchrun and the launcher; with "memory"
nobody dies, but that rank runs out of memory. The first plan to be reached strikes. `at` counts round where there are
fewer ranks.
PREFOPT_FAULT_NOTES is a file that gets a line before the kill, PREFOPT_TRAIL one that gets a line a step and rank:
the rows of the update just made and the number of ranks. PREFOPT_STOP, {"step": k, "file": RUN/STOP}, asks for a stop
in step k, so that the job ends with the checkpoint of step k. PREFOPT_JUMPING_CLOCK sets the wall clock to and fro.

The interpreter runs this before anything else; the package knows nothing of it.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time


def _note(file, **facts):
    line = json.dumps(facts) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(descriptor, line.encode())
    os.fsync(descriptor)
    os.close(descriptor)


def _kill(who):
    import psutil

    me = psutil.Process()
    agent = me.parent()
    others = [p for p in agent.children() if p.pid != me.pid]
    if who == "other" and not others:
        who = "self"
    if who == "all":
        for process in (agent.parent(), agent):
            process.kill()
    if who in ("all", "other"):
        for process in others:
            process.kill()
    if who in ("all", "self"):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def _planted(function, plan):
    calls = 0

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        now = calls == plan["call"]
        if now and plan["before"]:
            strike()
        result = function(*args, **kwargs)
        if now and not plan["before"]:
            strike()
        return result

    def strike():
        _note(os.environ["PREFOPT_FAULT_NOTES"], rank=os.environ["RANK"], plan=plan)
        if plan["who"] == "memory":
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. (planted)")
        _kill(plan["who"])

    return wrapper


def _let_the_clock_jump():
    """The wall clock is two hours late or early, in turns of a second."""
    wall, steady = time.time, time.monotonic
    time.time = lambda: wall() + (7200 if int(steady()) % 2 else -7200)


_step = {}


def _trail_gradient(function):
    @functools.wraps(function)
    def wrapper(engine, batch, *args, **kwargs):
        _step["rows"] = [int(row) for micro_batch, _ in batch._packed for row in micro_batch.rows]
        return function(engine, batch, *args, **kwargs)

    return wrapper


def _trail_rate(function):
    @functools.wraps(function)
    def wrapper(job, index):
        _step["step"] = index + 1
        return function(job, index)

    return wrapper


def _trail_update(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        _note(os.environ["PREFOPT_TRAIL"], rank=int(os.environ["RANK"]), ranks=int(os.environ["WORLD_SIZE"]), **_step)
        return result

    return wrapper


def _stopping(function, stop):
    @functools.wraps(function)
    def wrapper(batches, index):
        if index + 1 == stop["step"]:
            with open(stop["file"], "w"):
                pass
        return function(batches, index)

    return wrapper


def _patch(module, path, make):
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    setattr(owner, name, make(getattr(owner, name)))


class _Loader(importlib.abc.Loader):
    """The module's own loader, and the patches after it: before anybody can copy a name out of the module."""

    def __init__(self, loader, patches):
        self._loader, self._patches = loader, patches

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        for path, make in self._patches:
            _patch(module, path, make)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, patches):
        self._patches = patches

    def find_spec(self, name, path, target=None):
        if name not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Loader(spec.loader, self._patches[name])
        return spec


def _install():
    if "RANK" not in os.environ or not os.environ.get("PREFOPT_TRAIL"):
        return  # the launcher's check, torchrun itself
    if os.environ.get("PREFOPT_JUMPING_CLOCK"):
        _let_the_clock_jump()
    patches = {
        "prefopt_dist.training.step": [("forward_backward", _trail_gradient), ("optimizer_step", _trail_update)],
        "prefopt_dist.training.loop": [("_rate", _trail_rate)],
    }
    if os.environ.get("PREFOPT_STOP") and os.environ["RANK"] == "0":
        stop = json.loads(os.environ["PREFOPT_STOP"])
        patches["prefopt_dist.batching.batches"] = [("Prefetcher.take", functools.partial(_stopping, stop=stop))]
    for plan in json.loads(os.environ.get("PREFOPT_FAULTS") or "[]"):
        if plan["at"] % int(os.environ["WORLD_SIZE"]) == int(os.environ["RANK"]):
            module, path = plan["target"].split(":")
            patches.setdefault(module, []).append((path, functools.partial(_planted, plan=plan)))
    sys.meta_path.insert(0, _Finder(patches))


_install()
