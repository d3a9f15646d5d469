"""configs/monitoring/dashboard.json as Grafana would read it; tests/cluster runs its queries."""

import json
import re
from itertools import pairwise

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from partialfc.monitoring.exporter import OF_EVERY_RANK, OF_RANK_0, PREFIX
from partialfc.records.metrics import TABLE
from tests.support.places import ROOT

MONITORING = ROOT / "configs" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = DASHBOARD["panels"]
TARGETS = [target for panel in PANELS for target in panel.get("targets", ())]
COLUMNS = 24


def test_every_field_is_one_of_grafanas_own_schema():
    """Grafana Labs' models drop what they do not know, and nothing may be dropped or change."""
    register_default_plugins()
    read = Dashboard.from_json(json.loads(json.dumps(DASHBOARD)))
    again = json.loads(JSONEncoder().encode(read))
    assert not list(lost(DASHBOARD, again, "dashboard"))
    broken = json.loads(json.dumps(DASHBOARD))
    broken["panels"][0]["gridPos"]["width"] = 3
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(broken)))
    assert list(lost(broken, again, "dashboard")) == ["dashboard.panels.0.gridPos.width"]


def lost(own, read, where):
    if isinstance(own, dict) and isinstance(read, dict):
        for name, value in own.items():
            yield from lost(value, read.get(name), f"{where}.{name}")
    elif isinstance(own, list) and isinstance(read, list) and len(own) == len(read):
        for number, (one, other) in enumerate(zip(own, read, strict=True)):
            yield from lost(one, other, f"{where}.{number}")
    elif own != read:
        yield where


def test_panels_have_ids_of_their_own_and_share_no_place():
    """Grafana moves panels that overlap, and one of two with an id is lost."""
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    taken = {}
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    rows = sorted({y for _, y in taken})
    assert all(other - one == 1 for one, other in pairwise(rows)), "no gap between rows"


def test_every_query_asks_the_chosen_source_about_the_chosen_run():
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert (run["name"], run["type"]) == ("run", "query")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asked = [run, *DASHBOARD["annotations"]["list"], *TARGETS]
    assert all(one["datasource"] == chosen for one in asked)
    for panel in PANELS:
        letters = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(letters)) == len(letters), panel["title"]
    for target in [*DASHBOARD["annotations"]["list"], *TARGETS]:
        selectors = re.findall(r"\{([^}]*)\}", target["expr"])
        assert selectors, target["expr"]
        assert all('run="$run"' in selector for selector in selectors), target["expr"]


@pytest.mark.parametrize("name", ["dashboard.json", "rules.yml", "alerts.yml"])
def test_every_metric_that_is_asked_for_exists(name):
    text = (MONITORING / name).read_text()
    exported = {PREFIX + entry.name for entry in (*OF_EVERY_RANK, *OF_RANK_0)}
    exported |= {PREFIX + (metric.exported or metric.name) for metric in TABLE}
    recorded = set(re.findall(r"record: (\S+)", (MONITORING / "rules.yml").read_text()))
    asked = set(re.findall(r"\bpartialfc_[a-z_]+\b", text)) - {"partialfc_alerts"}
    assert not asked - exported
    assert not set(re.findall(r"\bpartialfc:[a-z_:]+\b", text)) - recorded
