"""results/ is as its manifest says, and small."""

from __future__ import annotations

import json

from experiments.bench import manifest


def test_the_manifest_is_true_and_the_results_are_small(monkeypatch):
    assert manifest.differences() == []
    assert sum(item["bytes"] for item in json.loads((manifest.ROOT / manifest.NAME).read_text())) < 45e6
    last = manifest.files()[-1]
    monkeypatch.setattr(manifest, "files", lambda: [last])
    assert str(last.relative_to(manifest.ROOT)) not in manifest.differences()
    monkeypatch.setattr(manifest, "described", lambda path: {"path": str(path.relative_to(manifest.ROOT)), "bytes": 0})
    assert str(last.relative_to(manifest.ROOT)) in manifest.differences()
