"""The report: made by every run, complete, and readable in a browser without a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from partialfc.__main__ import main
from partialfc.commands import report
from partialfc.protocols.curves import curves
from partialfc.records.report import read_run, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_run(folder, *, seed=0, lr=0.1, ended=True):
    """A run's files, with what a damaged or a hostile name could do to HTML."""
    generator = np.random.default_rng(seed)
    (folder / "checkpoints" / "step_00000400").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000400" / "backbone.safetensors").write_bytes(bytes(3 << 20))
    (folder / "config.toml").write_text(
        f'[run]\nfolder = "{folder}"\nseed = {seed}\n[optimizer]\nlr = {lr}\n'
        '[backbone]\nname = "<script>alert(1)</script>"\n'
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, 401, 10):
            record = {"step": step, "time": 1.0 * step}
            if step % 100 == 0:
                record |= {"verification_accuracy": 0.6 + step / 1100, "verification_tar": 0.5}
            if step:
                loss = 20 * np.exp(-step / 100) + generator.normal(0, 0.1)
                record |= {"loss": loss, "learning_rate": lr, "throughput": 900.0, "goodput": 0.8}
            file.write(json.dumps(record) + "\n")
    if not ended:
        return folder
    same = np.arange(600) % 2 == 0
    scores = np.where(same, 0.7, 0.0) + generator.normal(0, 0.15, 600)
    found = curves(scores, same)
    kept = {name: getattr(found, name) for name in found.__slots__}
    kept["untrained"] = {"far": [0.01, 1.0], "tar": [0.02, 1.0]}
    (folder / "curves.json").write_text(json.dumps({"lfw": kept}))
    numbers = {
        "accuracy": 0.9795, "accuracy_std": 0.01, "eer": 0.02, "auc": 0.998, "num_pairs": 600,
        "tar_at_far": {"0.1": 0.99, "0.01": 0.9, "0.001": None},
        "threshold": 0.275, "threshold_at_far": {"0.1": 0.2, "0.01": 0.31, "0.001": None},
    }  # fmt: skip
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "seconds": 266.0, "images_per_second": 1079.0, "peak_memory_bytes": 8e8,
                "steps": 400, "world_size": 2, "loss": 3.6,
                "spent": {"train": 200.0, "data": 40.0, "startup": 26.0, "other": 0.0},
                "environment": {"commit": "0123456789ab", "torch": "2.13.0"},
                "verification": {"set": "lfw", **numbers, "sets": {"lfw": numbers}},
            }
        )
    )  # fmt: skip
    return folder


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def parsed(path):
    tags = Tags()
    tags.feed(path.read_text())
    assert tags.open == []
    return tags


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    page = run / "report.html"
    tags, text = parsed(page), page.read_text()
    assert not {"script", "img", "link", "iframe"} & set(tags.seen)
    assert not [v for k, v in tags.attributes if k in ("src", "href", "srcset", "data")]
    assert "url(" not in text
    assert "@import" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text, "a setting is text, never a tag"
    for words in ("97.95", "Loss", "ROC of lfw", "DET of lfw", "Scores of lfw", "0123456789ab"):
        assert words in text, words
    for words in ("waiting for data 40 s", "3 MiB", "optimizer.lr", "99.00", "–", "0.275"):
        assert words in text, words
    assert len(text) < 200_000


def test_every_loss_beside_the_softmax_has_its_curve(tmp_path):
    """Of a teacher, and of a plug-in with any name; the loss scale is none of them."""
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    more = {"loss_teacher": 0.5, "loss_<b>mine": 2.0, "loss_scale": 1.0}
    changed = [json.dumps(json.loads(line) | more) for line in lines]
    (run / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    write_report(tmp_path / "report.html", [read_run(run)])
    text = (tmp_path / "report.html").read_text()
    assert "losses.teacher, without its weight" in text
    assert "losses.&lt;b&gt;mine, without its weight" in text
    assert "losses.scale" not in text


def test_people_who_were_trained_on_are_listed_by_name(tmp_path):
    run = make_run(tmp_path / "run")
    names = [f"Person {number}" for number in range(1200)]
    (run / "identities.json").write_text(json.dumps(["<b>Ann", None, *names]))
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    parsed(run / "report.html")
    assert "1,202 identities, by name" in text
    assert "0 &lt;b&gt;Ann, 1 –, 2 Person 0," in text
    assert "999 Person 997, and 202 more" in text


def figure(text, title):
    return text.split(f"<figcaption>{title}")[1].split("</figure>")[0]


def test_colours_are_named_and_the_untrained_curve_is_there(tmp_path):
    run = make_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    roc, scores = figure(text, "ROC of lfw"), figure(text, "Scores of lfw")
    for words in ('c0"></i>trained', 'c7"></i>at step 0', "false accept rate (log scale)"):
        assert words in roc, words
    assert re.findall(r'<polyline class="line (c\d)"', roc) == ["c0", "c7"]
    for colour, words in (("c2", "same person"), ("c1", "different people")):
        assert f'<i class="{colour}"></i>{words}' in scores
        assert f'<polyline class="line {colour}"' in scores
    assert "↑ log scale" in figure(text, "DET of lfw")
    assert "log scale" not in figure(text, "Loss")
    kept = json.loads((run / "curves.json").read_text())
    (run / "curves.json").write_text(json.dumps({"lfw": {"untrained": kept["lfw"]["untrained"]}}))
    assert report.main([str(run)]) == 0
    assert "ROC of lfw" not in (run / "report.html").read_text(), "only step 0 is measured"


def test_two_runs_stand_side_by_side_with_what_differs_first(tmp_path):
    a, b = make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", seed=2, lr=0.2)
    page = tmp_path / "both.html"
    assert report.main([str(a), str(b), "--out", str(page)]) == 0
    text = page.read_text()
    parsed(page)
    differing = text.split("<h2>Settings</h2>")[1].split("<details>")[0]
    assert "optimizer.lr" in differing
    assert "backbone.name" not in differing
    loss = text.split("<figcaption>Loss</figcaption>")[1].split("</figure>")[0]
    assert loss.count("<polyline") == 2
    assert figure(text, "ROC of lfw").count("<polyline") == 2, "of each run one, without step 0"
    axes = [re.findall("<text.*?</text>", figure(text, f"Scores of lfw ({name})")) for name in "ab"]
    assert axes[0] == axes[1], "on one scale"


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    run = make_run(tmp_path / "run", ended=False)
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "the run has not ended" in text
    assert "<polyline" in text


def test_what_is_no_run_is_refused_by_name(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "it holds no run" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text("[1]")
    assert main(["report", str(run)]) == 2
    assert "summary.json: must be an object" in capsys.readouterr().err


FRAME = """<body style="margin:0"><iframe src="page.html" width="WIDTH" height="3000"></iframe>
<pre id="out"></pre><script>onload = () => setTimeout(() => {
  const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
  const texts = [...inner.querySelectorAll("svg text")].map(t => t.getBoundingClientRect().height);
  document.getElementById("out").textContent = JSON.stringify({
    over: root.scrollWidth - root.clientWidth, text: Math.min(...texts),
    figures: inner.querySelectorAll("svg").length});
}, 300)</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_a_browser_shows_it_at_every_width_without_a_network(width, tmp_path):
    """Nothing sticks out of a phone's screen, text is readable, and it is not blank."""
    runs = [
        make_run(tmp_path / name, seed=i) for i, name in enumerate(("a_long_name_of_a_run", "b"))
    ]
    write_report(tmp_path / "page.html", [read_run(run) for run in runs])
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000",
        f"--window-size={max(width, 600)},3000",
    ]  # fmt: skip
    page = (tmp_path / "frame.html").as_uri()
    done = subprocess.run(
        [*command, "--dump-dom", page], capture_output=True, text=True, timeout=300
    )
    found = json.loads(re.search(r'<pre id="out">([^<]*)</pre>', done.stdout)[1])
    assert found["over"] == 0, "something is wider than the screen"
    assert found["figures"] >= 8
    assert found["text"] >= 9, "pixels; smaller text is not read on a phone"
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page], capture_output=True, timeout=300)
    with Image.open(shot) as picture:
        assert np.asarray(picture.convert("L")).std() > 8


def test_of_thousands_of_checkpoints_the_newest_are_listed(tmp_path, monkeypatch):
    make_run(tmp_path / "a")
    for step in range(1000, 1200):
        (tmp_path / "a" / "checkpoints" / f"step_{step:08d}").mkdir()
    run = read_run(tmp_path / "a")
    assert [step for step, _ in run.checkpoints] == list(range(1150, 1200))
    assert run.older == 151
    write_report(tmp_path / "report.html", [run])
    assert "and 151 before" in (tmp_path / "report.html").read_text()
