"""Kill everything at every moment, fill every disk, break the network; then compare.

    python benchmarks/faults.py --work DIR [--smoke] [PART ...]

Parts: verbs (`fault_processes.py`: the verbs of offsite-tuning), service (`fault_service.py`: the
vendor and a customer of split tuning), network (`fault_proxy.py`: what is between them). A row is
one fault, injected again and again: 60 times where a process is killed, 20 times elsewhere. Rows
are kept and resumed as in `offsite.py` (`rows.py`); results go to
benchmarks/results/faults-PART.json, and from there to docs/reliability.md (`readme.py`). `--smoke`
injects each fault twice.
"""

from functools import cache

import torch

import fault_processes
import fault_proxy
import fault_service
from rows import parse_options, run_parts

PARTS = ("verbs", "service", "network")
KILLS, OTHERS, SMOKE = 60, 20, 2
SEED = 1


def times(fault, smoke):
    """How often a fault is injected."""
    return SMOKE if smoke else KILLS if "killed" in fault else OTHERS


def plan(part, work, smoke):
    """The rows of a part: (name, function)."""

    @cache
    def world():
        folder = work / f"world-{part}"
        fault_processes.empty(folder)
        return fault_processes.World(folder) if part == "verbs" else fault_service.Sides(folder)

    def verb_row(_folder, name, fault):
        verb = next(verb for verb in world().verbs if verb.name == name)
        return fault_processes.try_out(world(), verb, fault, times(fault, smoke), SEED)

    def service_row(_folder, fault):
        return fault_service.try_out(world(), fault, times(fault, smoke), SEED)

    def network_row(folder, fault):
        return fault_proxy.proxy_row(folder, fault, times(fault, smoke), SEED)

    if part == "verbs":
        names = [
            (verb, fault) for fault in fault_processes.FAULTS for verb in fault_processes.VERBS
        ]
        return [(f"{verb}, {fault}", lambda f, a=(verb, fault): verb_row(f, *a))
                for verb, fault in names]  # fmt: skip
    row, faults = {
        "service": (service_row, fault_service.FAULTS),
        "network": (network_row, fault_proxy.ALL_FAULTS),
    }[part]
    return [(fault, lambda folder, fault=fault: row(folder, fault)) for fault in faults]


def main():
    options = parse_options(__doc__, PARTS, data=False)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    run_parts(
        "faults", options, lambda part: plan(part, options.work, options.smoke),
        facts={"kills": KILLS, "others": OTHERS, "seed": SEED}, data=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
