"""The order of the loop, and the table at its end."""

import json
import types

import agfsync_jax
from agfsync_jax import run
from agfsync_jax.utils import configs


def interval(mean):
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}


def summary():
    metrics = ("vqa", "referee_strict")
    entry = {
        "stages": {"sample": {"seconds": 90.0}, "train": {"seconds": 30.0}},
        "pairs": 300,
        "base": {name: interval(0.5) for name in metrics},
        "tuned": {name: interval(0.6) for name in metrics},
        "delta": {name: interval(0.1) for name in metrics},
        "win_rate": {"vqa": interval(0.7)},
    }
    return {"rounds": [entry, entry]}


def test_table():
    lines = run.table(summary()).splitlines()
    assert lines[0].split() == ["base", "tuned", "tuned", "-", "base", "win", "rate"]
    assert lines[1].startswith("vqa             0.500 [0.490, 0.510]  0.600 [0.590, 0.610]  +0.100")
    assert lines[1].endswith("0.700 [0.690, 0.710]")
    assert lines[2].startswith("referee_strict")
    assert lines[3] == "2 rounds, 600 pairs, 4.0 min"


def test_digits_follow_the_difference():
    entry = summary()["rounds"][0]
    entry["delta"]["vqa"] = {"mean": 0.0012, "low": 0.0008, "high": 0.0016}
    lines = run.table({"rounds": [entry]}).splitlines()
    assert "0.5000 [0.4900, 0.5100]" in lines[1] and "+0.0012 [+0.0008, +0.0016]" in lines[1]
    assert "0.500 [0.490, 0.510]" in lines[2]


def test_the_verbs_run_in_order(tmp_path, monkeypatch, capsys):
    order = []

    def verb(name):
        def main(config, workdir, *, round_index=0, repair=False, step="last"):
            assert name == "report" or step == "best"
            order.append((name, round_index, repair))
            if name == "report":
                (workdir / "summary.json").write_text(json.dumps(summary()))
                print("report: here")

        return types.SimpleNamespace(main=main)

    names = [module.__name__.rpartition(".")[2] for module in run.ROUND]
    assert names == "prompts questions sample score pair train evaluate".split()
    monkeypatch.setattr(run, "ROUND", [verb(name) for name in names])
    monkeypatch.setattr(agfsync_jax, "report", verb("report"), raising=False)
    monkeypatch.setattr(run.jax, "clear_caches", lambda: None)  # other tests have a use for them
    config = configs.load("configs/micro.py", {"rounds": "2"})
    run.main(config, tmp_path, repair=True, step="best")
    each = [(name, index, True) for index in range(2) for name in names]
    assert order == [*each, ("report", 0, False)]
    out = capsys.readouterr().out
    assert "report: here" in out and "referee_strict" in out
    order.clear()
    config = configs.load("configs/micro.py", {"pair.path": "people"})
    run.main(config, tmp_path, step="best")
    assert [name for name, _, _ in order] == ["pair", "train", "evaluate", "report"]
