"""The tables of docs/reliability.md, from what `faults.py` and `hostile_clients.py` wrote."""


def verb_table(verbs):
    """Every fault: how often it was injected into each verb, and what came of it."""
    rows = verbs["rows"]
    names = list(dict.fromkeys(name.partition(", ")[0] for name in rows))
    lines = [
        "| fault | " + " | ".join(names) + " | ended the command | run again |",
        "|---|" + "---:|" * len(names) + "---:|---|",
    ]
    for fault in dict.fromkeys(name.partition(", ")[2] for name in rows):
        of_fault = {v: rows[f"{v}, {fault}"] for v in names if f"{v}, {fault}" in rows}
        counts = [str(of_fault[v]["injected"]) if v in of_fault else "" for v in names]
        stopped = sum(row["stopped"] for row in of_fault.values())
        outcome = _outcome([row["equal"] for row in of_fault.values()])
        lines.append(f"| {fault} | " + " | ".join(counts) + f" | {stopped} | {outcome} |")
    return lines


def service_table(service):
    """Every fault of the two processes of split tuning."""
    lines = ["| fault | injected | ended a command | run again |", "|---|---:|---:|---|"]
    for fault, row in service["rows"].items():
        outcome = _outcome([row["equal"]])
        lines.append(f"| {fault} | {row['injected']} | {row['stopped']} | {outcome} |")
    return lines


def network_table(network):
    """Every fault of the network between them."""
    lines = [
        "| fault | injected | jobs | connections | commands that gave up | every job |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for fault, row in network["rows"].items():
        counts = " | ".join(str(row[k]) for k in ("injected", "jobs", "connections", "reruns"))
        lines.append(f"| {fault} | {counts} | {_outcome([row['equal']])} |")
    return lines


def hostile_table(crowds):
    """Every crowd beside a healthy job."""
    lines = [
        "| beside | job opened after, s | step p50, ms | p99, ms | server's memory, MiB | "
        "calls refused | job ends |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in crowds["rows"].items():
        times = f"{1000 * row['p50_seconds']:.0f} | {1000 * row['p99_seconds']:.0f}"
        lines.append(
            f"| {name.replace(' x ', ' x: ')} | {row['opening_seconds']:.1f} | {times} | "
            f"{row['memory_MiB']:.0f} | {row['refused']:,} | {_outcome([row['equal']])} |"
        )
    return lines


def _outcome(equal):
    wrong = equal.count(False)
    return "as undisturbed" if not wrong else f"**{wrong} of {len(equal)} differ**"
