"""Write the tables and figures of README.md and docs/ from benchmarks/results.

python benchmarks/readme.py          # write
python benchmarks/readme.py --check  # exit 1 if they differ from the results

A document marks where a table goes; `BLOCKS` says which results go there, `TABLES` who writes them.
"""

import sys
from pathlib import Path

import audit_tables
import competitor_tables
import fault_tables
import leakage_tables
import offsite_tables
import privatizer_tables
import split_tables
from figures import part, path_of

ROOT = Path(__file__).parent.parent

BLOCKS = {
    "README.md": {"results": ("main", "arc", "cost"), "split": ("split-sst2",)},
    "docs/choosing.md": {"frontier": ("frontier",), "grid": ("grid",), "ranking": ("ranking",)},
    "docs/split-results.md": {
        "leaks": ("split-leaks",),
        "news": ("split-fpb",),
        "decoder": ("split-smollm2",),
        "language": ("split-wikitext",),
        "depth": ("depth-mpnet",),
        "privatizers": ("privatizers-sst2", "privatizers-fpb"),
        "reading": ("privatizers-language", "privatizers-language-fpb"),
        "claim": ("claim-sst2",),
    },
    "docs/privacy.md": {
        "labels": ("targets-labels", "targets-questions"),
        "words": ("targets-words",),
        "search": ("privacy-search",),
    },
    "docs/attacks.md": {"audits": ("audits-attribute", "audits-dummies", "audits-prior")},
    "docs/adapters.md": {"leakage": ("leakage-arc",)},
    "docs/reliability.md": {
        "verbs": ("faults-verbs",),
        "service": ("faults-service",),
        "network": ("faults-network",),
        "hostile": ("hostile_clients-crowds",),
    },
    "docs/competitors.md": {
        "wiki": ("competitors-wiki",),
        "arc": ("competitors-arc",),
        "openbook": ("competitors-openbook",),
        "cost": ("competitors-cost", "competitors-pace"),
        "healing": ("competitors-healing",),
    },
}
TABLES = {
    "main": offsite_tables.wiki_table,
    "arc": offsite_tables.arc_table,
    "frontier": offsite_tables.frontier_table,
    "split-sst2": split_tables.split_table,
    "split-leaks": split_tables.leak_table,
    "privacy-search": split_tables.search_table,
    "claim-sst2": split_tables.claim_table,
    "targets-labels": lambda report: split_tables.label_table(report, "SST-2", 2),
    "targets-questions": lambda report: split_tables.label_table(report, "TREC", 6),
    "targets-words": split_tables.word_table,
    "split-fpb": split_tables.news_table,
    "depth-mpnet": split_tables.depth_table,
    "privatizers-sst2": lambda report: privatizer_tables.privatizer_table(report, "sst2"),
    "privatizers-language": lambda report: privatizer_tables.language_table(report, "sst2"),
    "privatizers-language-fpb": lambda report: privatizer_tables.language_table(report, "fpb"),
    "privatizers-fpb": lambda report: privatizer_tables.privatizer_table(report, "fpb"),
    "split-smollm2": split_tables.decoder_table,
    "split-wikitext": split_tables.language_table,
    "competitors-wiki": competitor_tables.wiki_table,
    "competitors-arc": lambda report: competitor_tables.choice_table(report, "ARC-Easy", "arc"),
    "competitors-openbook": lambda report: competitor_tables.choice_table(
        report, "OpenBookQA", "openbook"
    ),
    "competitors-pace": competitor_tables.pace_lines,
    "competitors-cost": competitor_tables.cost_table,
    "competitors-healing": competitor_tables.healing_table,
    "faults-verbs": fault_tables.verb_table,
    "faults-service": fault_tables.service_table,
    "faults-network": fault_tables.network_table,
    "hostile_clients-crowds": fault_tables.hostile_table,
    "audits-attribute": lambda report: audit_tables.audit_table(report, "attribute"),
    "audits-dummies": lambda report: audit_tables.audit_table(report, "dummies"),
    "audits-prior": lambda report: audit_tables.audit_table(report, "prior"),
    "leakage-arc": leakage_tables.leakage_table,
    "grid": offsite_tables.grid_table,
    "ranking": offsite_tables.ranking_table,
    "cost": offsite_tables.cost_lines,
}
FIGURES = {
    "docs/figures/grid.svg": (offsite_tables.grid_figure, "grid"),
    "docs/figures/emulators.svg": (competitor_tables.wiki_figure, "competitors-wiki"),
    "docs/figures/split.svg": (split_tables.split_figure, "split-sst2"),
}


def render(path):
    """What the file should be: a figure, or a document with its generated blocks filled in."""
    if path in FIGURES:
        draw, name = FIGURES[path]
        return draw(part(name))
    text = (ROOT / path).read_text()
    for block, parts in BLOCKS[path].items():
        begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
        tables = ["\n".join(TABLES[name](part(name))) for name in parts if path_of(name).exists()]
        if not tables:
            continue
        assert begin in text, f"{path} has no {begin}"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = head + begin + "\n" + "\n\n".join(tables) + "\n" + end + tail
    return text


def main():
    paths = {path: ROOT / path for path in (*BLOCKS, *FIGURES)}
    stale = [
        path
        for path, file in paths.items()
        if not file.exists() or render(path) != file.read_text()
    ]
    if "--check" in sys.argv:
        if stale:
            sys.exit(f"differ from benchmarks/results: {', '.join(stale)}")
        return
    for path in stale:
        paths[path].parent.mkdir(parents=True, exist_ok=True)
        paths[path].write_text(render(path))


if __name__ == "__main__":
    main()
