"""Rows of benchmarks: each is kept as JSON as soon as it is done, by any of several processes.

A row is (name, function); the function takes an empty folder and returns what JSON can hold. Done
rows lie in WORK/rows; what is there of a part is written to benchmarks/results, and rows found
there count as done.
"""

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from figures import RESULTS


def parse_options(description, parts, rate=False, data=True):
    """The command line of every benchmark; `rate` adds a hidden option of processes within rows."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=parts, help=", ".join(parts))
    if data:
        parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="directory for rows and the like")
    parser.add_argument("--smoke", action="store_true", help="little of everything")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--fresh", action="store_true", help="run committed rows again")
    if rate:
        parser.add_argument("--rate", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_rows(program, part, rows, *, work, facts, only="", fresh=False, smoke=False, data=True):
    """Run the rows of a part that are missing, and collect what is there.

    Args:
        program: "offsite" or the like; the results go to PROGRAM-PART.json.
        rows: (name, function) in the order in which they are wanted.
        facts: settings to keep beside the rows.
        only: run rows whose name holds this text.
        fresh: run rows again that are committed.
        smoke: results stay in WORK, committed rows do not count.
        data: whether the program reads data sets.
    """
    (work / "rows").mkdir(parents=True, exist_ok=True)
    results = RESULTS / f"{program}-{part}.json"
    earlier = json.loads(results.read_text())["rows"] if results.exists() and not smoke else {}
    committed = {name: row for name, row in earlier.items() if not (fresh and only in name)}
    for name, function in rows:
        if only in name and name not in committed:
            run_row(f"{part}/{name}", function, work)
    paths = {name: row_path(work, f"{part}/{name}") for name, _ in rows}
    ran = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    known = committed | ran
    done = {name: known[name] for name, _ in rows if name in known}
    import transformers

    report = {
        "command": f"python benchmarks/{program}.py{' --data DIR' * data} --work DIR {part}",
        "complete": len(done) == len(rows),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        "threads a row",
        **facts,
        "rows": done,
    }
    folder = work / "results" if smoke else RESULTS
    folder.mkdir(exist_ok=True)
    (folder / f"{program}-{part}.json").write_text(json.dumps(report, indent=1) + "\n")


def run_parts(program, options, rows_of, *, facts, data=True):
    """Run the parts that were asked for: `rows_of(part)` gives the rows of each, as `run_rows`."""
    for part in options.parts:
        run_rows(
            program, part, rows_of(part), work=options.work, facts=facts, only=options.only,
            fresh=options.fresh, smoke=options.smoke, data=data,
        )  # fmt: skip


def run_row(name, function, work):
    """Run one row, unless it is done or another process is at it."""
    path = row_path(work, name)
    claim = path.with_suffix(".running")
    if path.exists() or (claim.exists() and alive(claim)):
        return
    claim.write_text(str(os.getpid()))
    folder = work / "scratch" / path.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    print(f"{name} ...", flush=True)
    result = function(folder)
    result["row_seconds"] = time.perf_counter() - start
    path.write_text(json.dumps(result, indent=1))
    claim.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    shown = {k: v for k, v in result.items() if not isinstance(v, dict)}
    print(f"{name}: {shown}", flush=True)


def alive(claim):
    """Whether the process that made a claim still runs."""
    try:
        os.kill(int(claim.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def row_path(work, name):
    """Where a done row lies."""
    slug = name.replace("/", "--").replace(" ", "-").replace(",", "")
    return work / "rows" / f"{slug}.json"
