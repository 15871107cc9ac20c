import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest

from blindtune.errors import ConfigError, OutputError
from blindtune.evaluation.pages import plots, report, sections
from blindtune.evaluation.pages.figures import standalone
from blindtune.evaluation.pages.report import LayerStrip, Plot, Report, Section, Table
from blindtune.evaluation.utility.scoreboard import Cost, Scoreboard

NASTY = "<script>alert('$x_1$ & \"y\"')</script>"
VOID = {"meta"}
ROWS = {"ZS": 3.86, "Emulator ZS": 4.28, "Emulator FT": 3.77, "Plug-in": 3.38, "FT": 3.16}
PANELS = {
    "Plug-in": {(0.25, 0.4): 3.3, (0.25, 0.8): 3.4, (0.5, 0.4): 3.5},
    "Emulator FT": {(0.25, 0.4): 3.7, (0.25, 0.8): 4.0, (0.5, 0.4): 4.1},
}


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, attributes and text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def board(rows=ROWS, measure="nats"):
    return Scoreboard(
        measure=measure, data=NASTY, rows={name: (score,) for name, score in rows.items()}
    )


def full_report():
    return Report(
        title=f"A title {NASTY}",
        subtitle=NASTY,
        summary=["One sentence.", NASTY],
        numbers=[*sections.headline(board()), (NASTY, NASTY)],
        sections=[
            sections.scores(board({**ROWS, NASTY: 3.6})),
            sections.scores(board({"ZS": 0.5, "Plug-in": 0.6}, "accuracy")),
            sections.emulator(
                ["adapter", "raw", "compressed", "harmonizer", "adapter"],
                [0.5, -0.1, 0.2],
                first_layer=1,
            ),
            sections.tuning([(1, 4.0), (2, 3.0), (3, 3.2)], [(0, 4.2), (2, 3.5)]),
            Section(title="Other triplets", blocks=[plots.grid(PANELS)]),
            sections.costs([Cost(name=NASTY, seconds=1.5, bytes=2**20)]),
            Section(title=NASTY, text=[NASTY], notes=[NASTY], blocks=[nasty_table()]),
        ],
        facts={NASTY: {NASTY: NASTY, "alpha": 0.25}},
    )


def nasty_table():
    return Table(header=["", NASTY], rows=[[NASTY, NASTY]], caption=NASTY, emphasis=NASTY)


@pytest.fixture(scope="module")
def html():
    return report.render(full_report())


def test_page_is_well_formed(html):
    page = Page(html)
    assert page.tags[0] == "html"
    assert page.tags.count("svg") == 5
    assert page.tags.count("section") == 7
    for words in ("One sentence.", "Plug-in", "69 %", "alpha", "1.0 MiB", "How this was made"):
        assert words in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10


def test_page_loads_and_runs_nothing(html):
    page = Page(html)
    assert not re.search(r"https?:|@import|javascript:|data:", html)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href"}:
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert ("content", report.POLICY) in page.attributes


def test_everything_from_data_is_escaped(html):
    assert "<script" not in html
    page = Page(html)
    # title twice, subtitle, summary, two in numbers, row in plot and tables, costs, section, facts
    assert page.text.count("alert('$x_1$ & \"y\"')") >= 16


def test_references_inside_the_page_resolve(html):
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert used
    assert used <= ids


def test_same_report_same_bytes(html):
    assert report.render(full_report()) == html


def test_plots_keep_text_as_text_and_follow_the_page():
    svg = plots.five_rows(board()).svg
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("text")]
    assert {"Plug-in", "29.4", "47.5"} <= set(texts)
    assert "var(--accent)" in svg
    assert not re.search(r"(fill|stroke): *#", svg)
    assert "font-family" not in svg
    assert 'role="img"' in svg


def colours_of_bars(plot):
    return re.findall(r'style="fill: ([^;"]+)', plot.svg)


def test_importance_leaves_replaced_layers_hollow():
    filled = colours_of_bars(plots.importance([0.1, 0.2, 0.3], first_layer=2))
    hollow = colours_of_bars(plots.importance([0.1, 0.2, 0.3], first_layer=2, replaced=[3]))
    assert filled.count("var(--accent)") == 3
    assert hollow.count("var(--accent)") == 2


def test_names_of_points_that_lie_close_do_not_cover_each_other():
    points = {f"setting {i}": (0.5 + 0.01 * (i % 3), 0.30 + 0.02 * (i // 3)) for i in range(6)}
    points["far away"] = (0.0, 1.0)
    svg = plots.frontier(points, efficient=list(points)).svg
    drawn = re.findall(r'anchor: (\w+).*?x="([\d.]+)" y="([\d.]+)".*?>((?:sett|far )[^<]*)<', svg)
    assert {name for *_, name in drawn} == set(points)
    boxes = []
    for anchor, x, y, name in drawn:
        width = 4.2 * len(name)  # of 8 px
        left = float(x) - {"start": 0, "end": width, "middle": width / 2}[anchor]
        boxes.append((left, left + width, float(y)))
    for (left, right, y), (other_left, other_right, other_y) in combinations(boxes, 2):
        assert abs(y - other_y) > 7 or right < other_left or other_right < left


def test_grid_deepens_with_quality():
    def opacity_of(plot):
        return [float(value) for value in re.findall(r"opacity: ([\d.]+)", plot.svg)]

    values = {(0.1, 0.5): 3.0, (0.2, 0.5): 4.0}
    best, worst = opacity_of(plots.grid({"Plug-in": values}))
    assert best > worst
    best, worst = opacity_of(
        plots.grid({"Plug-in": {(0.1, 0.5): 0.3, (0.2, 0.5): 0.2}}, measure="accuracy")
    )
    assert best > worst
    single = plots.grid({"Plug-in": {(0.1, 0.5): 3.0}})
    assert "20.1" in single.svg


def test_one_row_one_run_one_point():
    assert "20.1" in plots.five_rows(board({"ZS": 3.0})).svg
    assert "5.0" in plots.five_rows(board({"ZS": 0.05}, "accuracy")).svg
    assert "3.00" in plots.curves({"validation": [(0, 3.0)]}, stressed="validation").svg


def test_letters_that_the_measuring_font_lacks():
    assert "模型" in plots.five_rows(board({**ROWS, "模型": 3.0})).svg


def test_strip_counts_its_layers():
    html = report.render(
        Report(
            title="t",
            sections=[
                Section(
                    title="s",
                    blocks=[
                        LayerStrip(kinds=["adapter", "harmonizer", "harmonizer"], caption="three")
                    ],
                )
            ],
        )
    )
    page = Page(html)
    assert "2 replaced by a harmonizer" in page.text
    assert page.attributes.count(("class", "harmonizer")) == 3
    with pytest.raises(AssertionError, match="unknown kinds"):
        LayerStrip(kinds=["adapter", "other"])


def test_headline_leaves_out_what_cannot_be_had():
    assert sections.headline(board()) == [
        ("69 %", "of full fine-tuning's gain recovered"),
        ("29.4", "plug-in perplexity (47.5 before)"),
        ("0.39", "nats better than the tuned emulator"),
    ]
    assert sections.headline(board({"Plug-in": 0.5}, "accuracy")) == [
        ("50.0 %", "plug-in accuracy")
    ]
    assert sections.headline(board({"ZS": 3.0})) == []


def test_small_reports_need_no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    section = Section(title="s", blocks=[nasty_table(), Plot(svg="<svg></svg>", wide=True)])
    Page(report.render(Report(title="t", sections=[section])))
    with pytest.raises(ConfigError, match=r"pip install 'blindtune\[report\]'"):
        plots.five_rows(board())


def test_write(tmp_path, html):
    report.write(full_report(), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html
    with pytest.raises(OutputError, match="cannot be"):
        report.write(full_report(), tmp_path)


def test_a_plot_alone_is_a_whole_svg_file_in_the_colours_of_the_report():
    drawn = standalone(plots.grid({"Plug-in": {(0.1, 0.5): 3.0}}, beta="rank removed"))
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "rank removed" in "".join(root.itertext())
    used = set(re.findall(r"var\((--[a-z]+)\)", drawn))
    assert used
    for name in used:
        assert drawn.count(f"{name}:") == 2, f"{name} has a light and a dark colour"


def contrast(first, second):
    """Of two colours, as WCAG 2 defines it: 1 for the same, 21 for black on white."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_pages_can_be_read_in_light_and_dark_and_on_paper():
    css = (Path(report.__file__).parent / "report.css").read_text()
    used = set(re.findall(r"var\((--\w+)\)", css))
    screens = [dict(re.findall(r"(--\w+): (#\w+)", block)) for block in css.split(":root")[1:4]]
    light, dark, paper = screens
    assert css.index("prefers-color-scheme: dark") < css.index(dark["--paper"])
    assert css.index("@media print") < css.rindex(":root")
    assert contrast("#000", "#fff") == pytest.approx(21)
    for colours in screens:
        assert set(colours) >= used
        assert contrast(colours["--ink"], colours["--paper"]) > 7
        for name in ("--muted", "--accent"):
            assert contrast(colours[name], colours["--paper"]) > 4.5, (name, colours)
    assert contrast(dark["--paper"], "#000") < 2 < contrast(dark["--paper"], "#fff")
    assert contrast(light["--paper"], "#fff") < 1.1
    assert paper["--paper"] == "#fff"
