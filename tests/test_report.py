"""The report: run directories found, joined and written up, without TensorFlow."""

import base64
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

import tf_gsnr.main
from tf_gsnr import experiments, records
from tf_gsnr.experiments.freezing import figure as freezing
from tf_gsnr.plots import claims
from tf_gsnr.report import __main__ as report
from tf_gsnr.report import document, runs

OSGR = experiments.load("osgr")

TOY = [
    "--dataset=toy",
    "--n=12",
    "--p_random=0,0.5",
    "--width=3",
    "--epochs=0,2",
    "--training_sets=2",
    "--learning_rate=0.01",
    "--test_size=40",
    "--name=tiny",
]


def run(*arguments):
    """The command line of the experiments, in this process."""
    with flagsaver.flagsaver():
        tf_gsnr.main.parse_flags(["main.py", *arguments])
        return tf_gsnr.main.run(["main.py"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A tiny grid whole, and in two shards."""
    path = tmp_path_factory.mktemp("toy")
    run(*TOY, f"--runs_dir={path / 'whole'}")
    for shard in ("0/2", "1/2"):
        run(*TOY, f"--runs_dir={path / 'shards'}", f"--shard={shard}")
    return path


def frozen_records(rise=0.03, fall=-0.005, seeds=3, correlation=0.4):
    """Records of the freezing experiment whose curves are known."""
    return [
        {
            "seed": seed,
            "frozen": frozen,
            "epoch": step,
            "gsnr_plain/second_layer": 0.03 + 1e-4 * seed + (fall if frozen else rise) * share,
            "gsnr_plain/feature00": 0.01 + 0.02 * share,
            "correlation/feature00": -0.1 - (correlation - 0.1) * share,
        }
        for seed in range(seeds)
        for frozen in (False, True)
        for step, share in ((0, 0), (10, 1), (20, 0.5))
    ]


def write_run(path, found, planned=2, experiment="freezing", **settings):
    """A run directory as an experiment leaves it."""
    directory = records.RunDirectory(path, {"experiment": experiment, "width": 5, **settings})
    directory.write_config(
        {
            "command": ["main.py", "--flagfile=/home/me/flags/x.flags", "--data_dir=/home/me/data"],
            "versions": {"tf_gsnr": "0"},
            "devices": ["CPU"],
            "processor": "a processor",
            "cpus": 2,
            "engine": "auto",
            "jit_compile": False,
            "started": "today",
        }
    )
    keys = [dict(seed=s, frozen=f) for s in range(planned) for f in (False, True)]
    directory.write_plan(keys, [0, 10, 20], ["repeats"])
    for record in found:
        directory.append(record)
    directory.add_seconds(75)
    return directory.path


def test_shards_are_joined_to_the_whole(toy):
    (whole,) = runs.find([toy / "whole"])
    (joined,) = runs.find([toy / "shards"])
    assert whole.name == joined.name == "tiny" and len(joined.parts) == 2
    assert [p.path.name for p in joined.parts] == ["tiny-0of2", "tiny-1of2"]
    assert [p.complete for p in joined.parts] == [1, 1] and joined.complete == joined.planned == 2
    assert joined.settings == whole.settings

    def ordered(found):
        keys = ("n", "p_random", "width", "epoch")
        return sorted(
            ({k: v for k, v in r.items() if not isinstance(v, str)} for r in found.records),
            key=lambda r: [r[k] for k in keys],
        )

    for a, b in zip(ordered(whole), ordered(joined), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, nan_ok=True), name
    tables = {OSGR.table(ordered(found)) for found in (whole, joined)}
    assert len(tables) == 1


def test_the_files_of_both_are_the_same_results(toy, tmp_path):
    for name in ("whole", "shards"):
        report.write([toy / name], tmp_path / name / "RESULTS.md")
    figures = [tmp_path / n / "docs/results/tiny.png" for n in ("whole", "shards")]
    assert figures[0].stat().st_size > 10_000
    whole, joined = ((tmp_path / n / "RESULTS.md").read_text() for n in ("whole", "shards"))
    cut = "### What tiny ran on"
    assert whole.split(cut)[0] == joined.split(cut)[0]
    assert "`tiny-0of2` | 1 of 2" in joined and "`tiny` | 2 of 2" in whole
    assert "](docs/results/tiny.png)" in whole and str(toy) not in whole + joined


def test_a_record_that_is_there_twice_counts_once(toy, capsys):
    (joined,) = runs.find([toy / "whole", toy / "shards"])
    assert len(joined.records) == 4 and len(joined.parts) == 3
    assert "2 of its 2 records are in" in capsys.readouterr().err
    assert json.loads(json.dumps(joined.settings)) == joined.settings


def test_other_settings_are_other_runs(tmp_path):
    found = frozen_records()
    for place, width in (("a", 5), ("b", 6)):
        write_run(tmp_path / place / "x", found, width=width)
    assert [r.name for r in runs.find([tmp_path / "a", tmp_path / "b"])] == ["x", "x-2"]


def test_the_document(tmp_path):
    write_run(tmp_path / "runs" / "small", frozen_records(), planned=3)
    output, html = report.write([tmp_path / "runs"], tmp_path / "RESULTS.md")
    text = output.read_text()
    lines = [line for line in text.splitlines() if "| figure 6 |" in line]
    assert len(lines) == 2 and all(line.startswith("| **holds** |") for line in lines)
    assert "python -m tf_gsnr.main --flagfile=flags/x.flags --data_dir=DIR" in lines[0]
    assert "/home/me" not in text + html.read_text() and str(tmp_path) not in text
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / link).exists()
    anchors = {document.slug(h) for h in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= anchors
    assert "| `width` | 5 |" in text and "1 min 15 s" in text and "2 cores of a processor" in text
    page = html.read_text()
    assert "data:image/svg+xml;base64," in page and 'src="docs' not in page and "http" not in page
    assert '<span class="badge good">holds</span>' in page


class Elements(HTMLParser):
    """The elements of a page, `(name, attributes)`; fails where one is not closed in its place."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_without_an_output_a_page_is_all(tmp_path, monkeypatch):
    """RESULTS.md, which a repository ships, is written when it is asked for and never else."""
    monkeypatch.chdir(tmp_path)
    write_run("runs/one", frozen_records(), planned=3)
    write_run("runs/two", frozen_records(), planned=3, seed=4)
    write_run("more/three", frozen_records(), planned=3, seed=5)
    (tmp_path / "RESULTS.md").write_text("as shipped")

    def written(*directories, **flags):
        return [file.resolve().relative_to(tmp_path) for file in report.write(directories, **flags)]

    assert written("runs") == written("runs", "more") == [Path("runs/report.html")]
    assert written("runs/one", "more") == [Path("more/report.html")]
    assert written("runs/one") == [Path("runs/one/report.html")]
    assert written("runs/one", "runs/two") == [Path("runs/report.html")]
    assert written("runs/one", "more/three") == [Path("report.html")]
    assert written("runs", html="a/page.html") == [Path("a/page.html")]
    assert (tmp_path / "RESULTS.md").read_text() == "as shipped"
    assert not list(tmp_path.rglob("*.png"))
    assert written("runs", output="b/R.md") == [Path("b/R.md"), Path("b/R.html")]
    assert written("runs", output="b/R.md", html="c.html") == [Path("b/R.md"), Path("c.html")]
    assert {file.name for file in tmp_path.rglob("*.png")} == {"one.png", "two.png"}
    with pytest.raises(ValueError, match="--figures=here: PNG figures are those of --output"):
        report.write(["runs"], figures="here")
    with pytest.raises(ValueError, match="--output=R.html: it is Markdown"):
        report.write(["runs"], "R.html")


def test_the_page_stands_alone_and_is_the_same_again(tmp_path):
    write_run(tmp_path / "runs" / "a", frozen_records(), planned=3)
    write_run(tmp_path / "runs" / "b", frozen_records(rise=-0.01), planned=3, seed=4)
    texts = [report.write([tmp_path / "runs"])[0].read_text() for _ in range(2)]
    assert texts[0] == texts[1]
    page = Elements(texts[0])
    assert not page.all("script") and not page.all("link") and not page.all("svg")
    images = [image["src"].split("data:image/svg+xml;base64,") for image in page.all("img")]
    assert [before for before, _ in images] == ["", ""]
    assert all(b"<svg " in base64.b64decode(image) for _, image in images)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert links[:3] == ["#the-claims", "#a", "#b"]  # the index comes first
    assert texts[0].index('class="index"') < texts[0].index("<table")


def test_markdown_and_page_say_the_same(tmp_path):
    write_run(tmp_path / "runs" / "a", frozen_records(rise=-0.01), planned=3)
    text, page = (f.read_text() for f in report.write([tmp_path / "runs"], tmp_path / "R.md"))
    page = re.sub(r"<style>.*?</style>|<title>.*?</title>", "", page, flags=re.S)
    page_words = re.findall(r"[\w.]+", unescape(re.sub(r"<[^>]+>", " ", page)))
    text = re.sub(r"\]\(.*?\)", "", text).replace("```text", "")
    assert Counter(page_words) == Counter(re.findall(r"[\w.]+", text))


def test_a_verdict_is_in_sight_on_a_phone(tmp_path):
    write_run(tmp_path / "runs" / "a", frozen_records(), planned=3)
    text = report.write([tmp_path / "runs"])[0].read_text()
    page = Elements(text)
    cells = [cell["data-label"] for cell in page.all("td")]
    assert cells[:7] == ["verdict", "claim", "where", "paper", "ours", "run", "command"]
    assert page.all("table")[0]["class"] == "stacked"  # a card a row, where it is narrow
    assert "<code><span>python</span> <span>-m</span> <span>tf_gsnr.main</span> <span>--" in text
    assert re.search(r"code span \{[^}]*white-space: nowrap", text)  # no break inside a word
    assert re.search(r"\bpre \{[^}]*overflow-x: auto", text)
    settings = next(t for t in re.findall("<table.*?</table>", text, re.S) if ">width<" in t)
    assert "stacked" not in settings


def test_the_page_in_the_dark_and_on_paper(tmp_path):
    write_run(tmp_path / "runs" / "a", frozen_records(), planned=3)
    text = report.write([tmp_path / "runs"])[0].read_text()
    assert "@media screen and (prefers-color-scheme: dark)" in text and "@media print" in text
    assert re.search(r"\.plate \{[^}]*background: #fff", text)  # figures stay on a light card
    assert re.search(r'<div class="plate"><img ', text)
    light, dark = (set(re.findall(r"(--[\w-]+): #", part)) for part in text.split("@media", 2)[:2])
    assert light == dark  # every colour of the one has its like in the other


def test_what_was_found_comes_before_the_tables(tmp_path):
    write_run(tmp_path / "runs" / "a", frozen_records(rise=0.003, correlation=0.05), planned=4)
    text, page = (f.read_text() for f in report.write([tmp_path / "runs"], tmp_path / "R.md"))
    section = text[text.index("## a\n") :]
    assert "[a](#a): 1 of 3 claims holds" in text
    assert "1 of 3 claims holds, 1 holds partly, 1 does not hold." in section
    assert "Unfinished: 6 of 8 configurations are complete." in section
    points = re.findall(r"^- (.*)$", section, re.M)
    assert [p.split("**")[1] for p in points] == ["holds partly", "holds", "does not hold"]
    assert "it falls at first and stays low (figure 6). Ours: 0.030 to 0.025" in points[1]
    assert points[1].endswith(
        'the paper: "decreases in the beginning and remains at a low level" [text].'
    )
    order = ["Unfinished", "- **holds partly**", "![", "first layer  seeds", "### Settings of a"]
    assert sorted(order, key=section.index) == order
    assert page.count("<details>") == 2 and page.count("</details>") == 2
    for title in ("Settings of a", "What a ran on"):
        assert re.search(rf"<details>\s*<summary[^>]*>{title}</summary>\s*<div[^>]*><table", page)


def test_only_what_does_not_hold_differs(tmp_path):
    """A claim that holds may have a remark too; it is no difference."""
    for name, rise in (("good", 0.03), ("bad", -0.01)):
        write_run(tmp_path / name / name, frozen_records(rise=rise), planned=3)
        page = report.write([tmp_path / name])[0].read_text()
        assert ("Where bad differs, and why" in page) == (name == "bad")
        assert ("Notes on good" in page) == (name == "good")
        assert page.count("The paper does not give the initial weights") == 1
        assert "differs" not in page or name == "bad"


def test_an_experiment_without_claims(tmp_path, monkeypatch):
    monkeypatch.delattr(freezing, "claims")
    monkeypatch.delattr(experiments.load("freezing"), "claims", raising=False)
    write_run(tmp_path / "runs" / "a", frozen_records(), planned=3)
    text = report.write([tmp_path / "runs"], tmp_path / "R.md")[0].read_text()
    assert "- [a](#a): no claims" in text and "No claim of the paper is tested here." in text
    assert "The claims" not in text


def test_the_readme_has_the_runs_and_their_verdicts(tmp_path):
    root = Path(report.__file__).parents[2]
    spec = importlib.util.spec_from_file_location("make_pages", root / "docs" / "make_pages.py")
    make_pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_pages)
    make_pages.HERE = tmp_path / "docs"
    write_run(tmp_path / "runs" / "a", frozen_records(), planned=3)
    report.write([tmp_path / "runs"], tmp_path / "RESULTS.md")
    (tmp_path / "README.md").write_text("<!-- results: -->\n<!-- /results -->\n")
    made = make_pages.results()
    assert "\n- [a](RESULTS.md#a): 3 of 3 claims hold\n" in made


def test_cells_are_escaped():
    table = document.Table(("|r|",), [("W * g < 0, gsnr_max",), (document.Code("a|b"),)])
    assert document.markdown([table], ".").splitlines() == [
        "| \\|r\\| |",
        "| --- |",
        "| W \\* g \\< 0, gsnr_max |",
        "| `a\\|b` |",
    ]
    assert "W * g &lt; 0" in document.html([table], "t")


def test_freezing_verdicts_follow_the_numbers():
    def verdicts(**kwargs):
        return [c.verdict for c in freezing.claims(frozen_records(**kwargs))]

    holds, partly, fails = claims.HOLDS, claims.PARTLY, claims.FAILS
    assert verdicts() == [holds, holds, holds]
    assert verdicts(rise=0.003) == [partly, holds, holds]
    assert verdicts(rise=-0.01, fall=0.01, correlation=0.05) == [fails, fails, fails]
    assert verdicts(seeds=1)[0] == holds  # one seed has no error: by the sign
    assert freezing.claims([r for r in frozen_records() if r["epoch"] == 0]) == []
    assert len(freezing.claims([r for r in frozen_records() if r["frozen"]])) == 1


def test_an_unfinished_run_says_how_far_it_is(tmp_path, capsys):
    write_run(tmp_path / "half", frozen_records(seeds=2)[:-1])
    write_run(tmp_path / "new", [], width=7)
    report.write([tmp_path], tmp_path / "out" / "RESULTS.md")
    said = capsys.readouterr().err
    assert "half is unfinished: 3 of 4 configurations" in said
    assert "left out: new has no records yet" in said
    with pytest.raises(ValueError, match="has a record to show"):
        report.write([tmp_path / "new"], tmp_path / "RESULTS.md")


def test_what_is_no_run_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        runs.find([tmp_path / "nowhere"])
    (tmp_path / "runs" / "other").mkdir(parents=True)
    with pytest.raises(ValueError, match="neither a run directory nor one that holds some"):
        runs.find([tmp_path / "runs"])
    fit = records.RunDirectory(tmp_path / "runs" / "fit", {"every_epochs": 1})
    fit.write_config({})
    with pytest.raises(ValueError, match="fit: no run of an experiment: KeyError"):
        runs.find([fit.path])
    old = write_run(tmp_path / "runs" / "old", [])
    (old / "plan.json").unlink()
    with pytest.raises(ValueError, match="no plan.json.*the same command again writes it"):
        runs.find([old])
    write_run(tmp_path / "runs" / "theirs", frozen_records(), experiment="no_such_experiment")
    with pytest.raises(ValueError, match="has a record to show"):
        report.write([tmp_path / "runs" / "theirs"], tmp_path / "RESULTS.md")
    assert "left out: theirs: its experiment is 'no_such_experiment'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has a record to show"):
        report.write([tmp_path / "runs" / "theirs"], modules=["no_such_experiment"])
    assert "left out: theirs: unknown experiment 'no_such_experiment'" in capsys.readouterr().err


def test_an_empty_shard_is_refused():
    with pytest.raises(ValueError, match="--shard=7/8: there are 2 configurations"):
        run(*TOY, "--shard=7/8")


def test_the_time_of_a_run_adds_up(toy, tmp_path):
    config = records.read_config(toy / "whole" / "tiny")
    assert 0 < config["seconds"] < 600 and config["processor"] and not math.isnan(config["seconds"])
    directory = records.RunDirectory(tmp_path, {})
    directory.write_config({})
    directory.add_seconds(2)
    directory.write_config({"again": True})
    directory.add_seconds(3)
    assert records.read_config(tmp_path)["seconds"] == 5


def test_the_command_opens_without_tensorflow(tmp_path):
    write_run(tmp_path / "runs" / "small", frozen_records(), planned=3)
    code = (
        "import sys; from absl import app; from tf_gsnr.report import __main__ as m; "
        "app.run(lambda a: (m.main(a), sys.exit('tensorflow' in sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "runs"), f"--output={tmp_path / 'R.md'}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "R.md").exists() and (tmp_path / "R.html").exists()
    assert "runs_dir" in flags.FLAGS  # of the other binary, not of this one
