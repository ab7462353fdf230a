"""What is kept of a claim's plan."""

from __future__ import annotations

import json
import sys

from benchmarks import claims


def test_kept(tmp_path, monkeypatch, capsys):
    """Figures and curves, not single answers; no path of the machine; without curves where they would be too much."""
    run = {
        "workdir": f"{tmp_path}/some/arms/a/seed0",
        "final": {"x": 1.5},
        "curve": {"step": [1, 2]},
        "items": {"y": 1},
    }
    command = f"attnlab train --config {tmp_path}/some/arms/a/seed0/config.json"
    (tmp_path / "some").mkdir()
    (tmp_path / "some/results.json").write_text(json.dumps({"plan": {"command": command}, "runs": [run]}))
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "some")])
    assert claims.main() == 0
    text = (tmp_path / "some.json").read_text()
    kept = json.loads(text)
    assert str(tmp_path) not in text and kept["plan"]["command"].endswith(" runs/some/arms/a/seed0/config.json")
    assert kept["runs"] == [{k: v for k, v in run.items() if k != "items"} | {"workdir": "runs/some/arms/a/seed0"}]
    monkeypatch.setattr(claims, "MOST", 10)
    assert claims.main() == 0 and "curve" not in json.loads((tmp_path / "some.json").read_text())["runs"][0]
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "none")])
    assert claims.main() == 2 and "has the plan run?" in capsys.readouterr().err
