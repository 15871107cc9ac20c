"""Speed of the privatizers: exact nearest rows against the matmul they cannot do without.

    python benchmarks/privacy.py [--smoke] [--device cuda] [--queries N] [--out FILE]

For vocabularies of 49k to 150k words and D = 384 to 4096: tokens per second of the exact search for
noisy embeddings, of the floor (the same tiles' float32 matmul alone, plus the minimum of each
tile: nothing that looks at every distance does less), of drawing the noise, and of token mode as a
whole; and the share of queries that differ from a plain float32 search. Tables are Gaussian rows
with a common mean, with noise at which about half of the tokens change; every size is checked
against a float64 brute force on some queries. Written as JSON to
benchmarks/results/privacy-search.json, size by size: run again, it goes on with what is missing.
`--smoke` runs small sizes in seconds and prints only.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from blindtune.privacy.entropy import system_uniforms
from blindtune.privacy.metric_dp import Mechanism, Privatizer, d_chi_noise
from blindtune.privacy.nearest import NearestRows, Tiling
from blindtune.privacy.noise_level import NoiseSurvey

RESULTS = Path(__file__).parent / "results" / "privacy-search.json"
SIZES = [(v, d) for v in (49_152, 100_352, 151_936) for d in (384, 768, 1024, 2048, 4096)]
SIZES.sort(key=lambda size: size[0] * size[1])
SMOKE_SIZES = [(4_096, 64), (8_192, 384)]


def timed(work, device):
    """Result and seconds of the second of two runs, so that nothing is set up in it."""
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
    return result, time.perf_counter() - start


def table_of(rows, width, device):
    generator = torch.Generator().manual_seed(rows + width)
    table_VD = torch.empty(rows, width)
    for tile_TD in table_VD.split(8192):
        tile_TD.normal_(generator=generator)
    return (table_VD.add_(torch.randn(width, generator=generator)) / width**0.5).to(device)


def floor(query_ND, table_VD, tiling):
    """Matmul and minimum, tile by tile: the work that every exact search by matmul does."""
    for row_TD in table_VD.split(tiling.rows):
        norm_T = row_TD.square().sum(1)
        for query_QD in query_ND.split(tiling.queries):
            torch.addmm(norm_T, query_QD, row_TD.T, alpha=-2).amin(1)


def plain_float32(query_ND, table_VD):
    distance = [torch.addmm(table_VD.square().sum(1), q, table_VD.T, alpha=-2).argmin(1)
                for q in query_ND.float().split(64)]  # fmt: skip
    return torch.cat(distance)


def brute_force(query_ND, table_VD):
    """Float64, query by query, row tile by row tile."""
    found = []
    for query_D in query_ND.double():
        distance = [(query_D - t.double()).square().sum(1) for t in table_VD.split(16_384)]
        found.append(torch.cat(distance).argmin())
    return torch.stack(found)


def measure(rows, width, queries, checked, device):
    table_VD = table_of(rows, width, device)
    tiling = Tiling()
    eta = NoiseSurvey(table_VD, samples=32).eta_for(0.5)
    ids = torch.randint(rows, (queries,), generator=torch.Generator().manual_seed(0)).to(device)
    noise_ND, noise_seconds = timed(
        lambda: d_chi_noise(queries, width, eta, system_uniforms).to(device), device
    )
    query_ND = table_VD[ids].double() + noise_ND
    search, setup_seconds = timed(lambda: NearestRows(table_VD, tiling), device)
    found, search_seconds = timed(lambda: search.find(query_ND), device)
    query32_ND = query_ND.float()
    _, floor_seconds = timed(lambda: floor(query32_ND, table_VD, tiling), device)
    machine = Privatizer(Mechanism(eta=eta), table_VD, tiling=tiling)
    _, token_seconds = timed(lambda: machine.tokens(ids[None]), device)
    wrong = found[:checked] != brute_force(query_ND[:checked], table_VD)
    assert not wrong.any(), f"{int(wrong.sum())} of {checked} answers differ from the brute force"
    return {
        "vocabulary": rows,
        "hidden": width,
        "queries": queries,
        "eta_per_token": eta,
        "search_tokens_per_second": queries / search_seconds,
        "floor_tokens_per_second": queries / floor_seconds,
        "search_over_floor": floor_seconds / search_seconds,
        "floor_gflops": 2e-9 * queries * rows * width / floor_seconds,
        "noise_tokens_per_second": queries / noise_seconds,
        "token_mode_tokens_per_second": queries / token_seconds,
        "setup_seconds": setup_seconds,
        "changed_share": (found != ids).double().mean().item(),
        "plain_float32_differs_share": (plain_float32(query_ND, table_VD) != found)
        .double()
        .mean()
        .item(),
        "checked_against_float64": checked,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes = SMOKE_SIZES if options.smoke else SIZES
    queries = min(options.queries, 256) if options.smoke else options.queries
    facts = {
        "command": f"python benchmarks/privacy.py --queries {queries}",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    kept = {} if options.smoke or not options.out.exists() else json.loads(options.out.read_text())
    found = kept["rows"] if kept and {**kept, "rows": 0} == {**facts, "rows": 0} else []
    done = {(row["vocabulary"], row["hidden"]) for row in found}
    for rows, width in (size for size in sizes if size not in done):
        found.append(measure(rows, width, queries, 32, options.device))
        print(json.dumps(found[-1]), flush=True)
        if not options.smoke:
            options.out.parent.mkdir(exist_ok=True)
            options.out.write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
