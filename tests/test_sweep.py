"""A sweep trains every point once, on nested samples, and survives being killed."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tsugiki.adapt import sweep as module
from tsugiki.adapt.fit import FitSettings, fit, load_base
from tsugiki.adapt.nll import bits_per_character, completion_nll
from tsugiki.adapt.optimum import find_optimum
from tsugiki.adapt.sweep import SweepSettings, run_sweep
from tsugiki.artifacts import read_json
from tsugiki.errors import UserError
from tsugiki.lineage import check_lineage
from tsugiki.recipes.pretrain import TINY_BASES, build_model
from tsugiki.samples import EncodedSample, write_encoded

TINY_LLAMA = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
FIT = FitSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=1, batch_size=4, micro_batch=4)
SETTINGS = SweepSettings(counts=(16, 8, 999), workers=1, train_items=5, fit=FIT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    shape = replace(TINY_BASES["tiny-llama"], layers=1, hidden=32, ffn=48, heads=4, kv_heads=2, vocab_size=len(tokenizer))
    model = build_model(shape, tokenizer)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("bases") / "my-base"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(split, count):
    rng = np.random.default_rng(len(split))
    return [
        EncodedSample(f"{split}{i}", "問", "答" * (1 + i % 4), f"{split}{i // 2}", ("rule", "fact")[i % 2],
                      rng.integers(0, 6000, 3 + i).tolist(), rng.integers(0, 50, 2 + i % 5).tolist())
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train = rows("train", 20)
    train[18] = replace(train[18], completion_ids=[])  # only a count of more than 18 meets it
    write_encoded(folder / "train.jsonl", train)
    write_encoded(folder / "test.jsonl", rows("test", 12))
    return folder


@pytest.fixture(scope="module")
def swept(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return out, run_sweep(base, data, out, SETTINGS)


def times(out):
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("points/*/point.json")}


def completed(out):
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.sqlite3'}")
    return sorted((t.params["n"], t.params["seed"], t.value) for t in study.get_trials(states=(TrialState.COMPLETE,)))


def states(out):
    return {t.state for t in optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.sqlite3'}").trials}


def nats(out, point):
    return np.load(out / "points" / point / "nats.npy", allow_pickle=False)


# --- one sweep ------------------------------------------------------------------------------------------------


def test_the_points_are_prefixes_of_one_order(swept):
    _, result = swept
    assert [(p["n"], p["seed"], p["epochs"]) for p in result["points"]] == [(8, 0, 1), (16, 0, 1)]
    for p in result["points"]:  # every row has a length of its own
        assert p["train_tokens"] == sum(len(s.ids) for s in rows("train", 20)[: p["n"]])
        assert p["steps"] == p["n"] / 4


def test_counts_larger_than_the_data_are_left_out_and_said(swept):
    _, result = swept
    assert result["left_out"] == [999]
    assert set(result["p_best_by_n"]) == {"8", "16"}


def test_the_file_holds_what_was_returned_in_full(swept):
    out, result = swept
    assert read_json(out / "sweep.json") == {**result, "settings": read_json(out / "sweep.json")["settings"]}
    assert {"n", "seed", "epochs", "nll", "nll_ci", "bpc", "train_tokens", "seconds"} <= set(result["points"][0])
    assert set(result["optimum"]) == {"n", "nll", "nll_ci", "one_se_n", "p_best", "overfits_at"}
    assert result["base"]["n"] == 0
    assert result["settings"]["fit"] == asdict(FIT)
    for p in (*result["points"], result["base"]):
        assert p["nll_ci"][0] < p["nll"] < p["nll_ci"][1]
        assert set(p["nll_by_kind"]) == {"rule", "fact"}


def test_every_number_follows_from_the_nats_of_each_sample(swept):
    out, result = swept
    test = rows("test", 12)
    tokens = np.array([len(s.completion_ids) for s in test])
    for p in result["points"]:
        of_samples = nats(out, f"n{p['n']:06d}-s0")
        assert p["nll"] == pytest.approx(of_samples.sum() / tokens.sum(), rel=1e-12)
        assert p["bpc"] == pytest.approx(of_samples.sum() / np.log(2) / sum(len(s.completion) for s in test), rel=1e-12)
        rule = np.array([s.kind == "rule" for s in test])
        assert p["nll_by_kind"]["rule"] == pytest.approx(of_samples[rule].sum() / tokens[rule].sum(), rel=1e-12)
    curve = {n: nats(out, f"n{n:06d}-s0") for n in (8, 16)}
    expected = find_optimum(curve, tokens, [s.document for s in test])
    assert result["optimum"]["n"] == expected.n
    assert result["optimum"]["nll"] == pytest.approx(expected.nll)


def test_the_base_is_scored_without_an_adapter(swept, base):
    _, result = swept
    exact = completion_nll(load_base(base, exact=True).eval(), rows("test", 12))
    assert result["base"]["nll"] == pytest.approx(exact.per_token, abs=1e-5)


def test_the_adapter_kept_is_that_of_the_optimum_and_plain_peft_loads_it(swept, base):
    out, result = swept
    model = PeftModel.from_pretrained(load_base(base, exact=True), out / "adapter").eval()
    found = completion_nll(model, rows("test", 12))
    assert result["kept"]["n"] == result["optimum"]["n"]
    assert found.per_token == pytest.approx(result["optimum"]["nll"], abs=1e-5)
    assert bits_per_character(found, rows("test", 12)) == pytest.approx(
        next(p["bpc"] for p in result["points"] if p["n"] == result["optimum"]["n"]), abs=1e-5
    )
    shown = completion_nll(model, rows("train", 20)[:5]).per_token
    assert shown == pytest.approx(next(p["train_nll"] for p in result["points"] if p["n"] == result["kept"]["n"]), abs=1e-5)


def test_the_adapter_names_its_base_and_no_folder_of_this_machine(swept, base):
    out, _ = swept
    assert read_json(out / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "my-base"
    assert sorted(p.name for p in (out / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "base.json"]
    for name in ("adapter_config.json", "base.json"):
        assert str(base.parent) not in (out / "adapter" / name).read_text()
    assert check_lineage(out / "adapter", base) is True


def test_the_study_on_disk_holds_one_completed_trial_a_point(swept):
    out, result = swept
    assert completed(out) == [(p["n"], p["seed"], pytest.approx(p["nll"])) for p in result["points"]]


def test_nothing_is_left_beside_the_points(swept):
    out, _ = swept
    kept = {p.name for p in out.iterdir()} - {"logs"}  # TensorBoard's, where it is installed
    assert kept == {"adapter", "points", "study.sqlite3", "sweep.json"}
    assert sorted(p.name for p in (out / "points").iterdir()) == ["base", "n000008-s0", "n000016-s0"]


def test_a_second_call_trains_nothing(swept, base, data):
    out, result = swept
    before = times(out)
    assert run_sweep(base, data, out, SETTINGS) == result
    assert run_sweep(base, data, out, replace(SETTINGS, counts=(8,)))["optimum"]["n"] == 8
    assert run_sweep(base, data, out, SETTINGS) == result
    assert times(out) == before
    assert len(completed(out)) == 2


# --- sweeps that train again ----------------------------------------------------------------------------------


def test_changed_settings_train_again_and_other_counts_do_not(swept, base, data, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(swept[0], out)
    before = times(out)
    changed = replace(SETTINGS, counts=(8,), fit=replace(FIT, learning_rate=1e-3))
    result = run_sweep(base, data, out, changed)
    after = times(out)
    assert after["n000016-s0"] == before["n000016-s0"]
    assert after["n000008-s0"] > before["n000008-s0"]
    assert result["points"][0]["nll"] != swept[1]["points"][0]["nll"]
    assert result["base"]["nll"] == swept[1]["base"]["nll"]


def test_the_number_of_workers_changes_nothing(swept, base, data, tmp_path):
    out, result = swept
    both = run_sweep(base, data, tmp_path, replace(SETTINGS, workers=2))
    for point in ("base", "n000008-s0", "n000016-s0"):
        np.testing.assert_allclose(nats(tmp_path, point), nats(out, point), atol=1e-6, rtol=0)
    assert both["optimum"]["n"] == result["optimum"]["n"]


def alive(group):
    """Processes of a process group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(of_group) == group and state != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_sweep_is_finished_by_the_next_call_and_leaves_no_process(base, data, tmp_path):
    out = tmp_path / "sweep"
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tsugiki.adapt.fit import FitSettings\n"
        "from tsugiki.adapt.sweep import SweepSettings, run_sweep\n"
        "if __name__ == '__main__':\n"
        "    fit = FitSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=1, batch_size=4, micro_batch=4)\n"
        "    run_sweep(*map(Path, sys.argv[1:]), SweepSettings(counts=(8, 16), workers=1, train_items=5, fit=fit))\n"
    )
    killed = subprocess.Popen([sys.executable, str(script), str(base), str(data), str(out)], cwd=tmp_path, start_new_session=True)
    first = out / "points" / "n000016-s0" / "point.json"
    deadline = time.monotonic() + 600
    while not first.exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)  # the parent alone: its worker has to notice
    killed.wait()
    deadline = time.monotonic() + 60
    while alive(killed.pid):
        assert time.monotonic() < deadline, alive(killed.pid)
        time.sleep(0.1)
    assert not (out / "sweep.json").exists()
    before = times(out)

    result = run_sweep(base, data, out, SETTINGS)
    after = times(out)
    assert {name: after[name] for name in before} == before
    assert set(after) == {"base", "n000008-s0", "n000016-s0"}
    assert sorted(p.name for p in (out / "points").iterdir()) == sorted(after)
    assert completed(out) == [(p["n"], p["seed"], pytest.approx(p["nll"])) for p in result["points"]]
    assert states(out) <= {TrialState.COMPLETE, TrialState.FAIL}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_fit_that_was_killed_goes_on_from_its_checkpoint_to_the_same_losses(base, data, tmp_path):
    def settings(minutes):
        long = replace(FIT, epochs=40, checkpoint_minutes=minutes)  # 160 steps: more than a worker does until it notices
        return SweepSettings(counts=(16,), workers=1, train_items=5, fit=long)

    (tmp_path / "run.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom tsugiki.adapt.fit import FitSettings\n"
        "from tsugiki.adapt.sweep import SweepSettings, run_sweep\n"
        "if __name__ == '__main__':\n"
        f"    run_sweep(*map(Path, sys.argv[1:]), {settings(1e-9)!r})\n"
    )
    out = tmp_path / "out"
    killed = subprocess.Popen([sys.executable, "-P", tmp_path / "run.py", base, data, out], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 600
    while not list(out.glob("unfinished/*/last.json")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    while alive(killed.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (out / "points" / "n000016-s0").exists()

    run_sweep(base, data, out, settings(0))
    resumed = read_json(out / "points" / "n000016-s0" / "point.json")
    _, alone = fit(base, AutoTokenizer.from_pretrained(base), rows("train", 20)[:16], settings(0).fit, tmp_path / "alone")
    assert 0 < resumed["resumed_at"] < 160
    assert len(resumed["losses"]) == 32 and resumed["losses"] == pytest.approx(alone.losses, abs=1e-6)
    assert not (out / "unfinished").exists()


def test_equal_steps_give_every_count_the_steps_of_the_largest(base, data, tmp_path):
    result = run_sweep(base, data, tmp_path, replace(SETTINGS, mode="steps", fit=replace(FIT, epochs=2)))
    assert [(p["n"], p["steps"], p["epochs"]) for p in result["points"]] == [(8, 8, 4), (16, 8, 2)]
    lengths = [sum(len(s.ids) for s in rows("train", 20)[:n]) for n in (8, 16)]
    assert [p["train_tokens"] for p in result["points"]] == [4 * lengths[0], 2 * lengths[1]]
    assert (result["settings"]["mode"], result["settings"]["fit"]["max_steps"]) == ("steps", 8)


def test_both_modes_are_two_curves_that_share_the_largest_count(swept, base, data, tmp_path):
    result = run_sweep(base, data, tmp_path, replace(SETTINGS, mode="both"))
    steps = result["equal_steps"]
    assert [(p["n"], p["steps"]) for p in result["points"]] == [(8, 2), (16, 4)]
    assert [(p["n"], p["steps"], p["epochs"]) for p in steps["points"]] == [(8, 4, 2), (16, 4, 1)]
    assert steps["points"][1] == result["points"][1]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("nats.npy")) == [
        "equal_steps/points/n000008-s0/nats.npy", *(f"points/{name}/nats.npy" for name in ("base", "n000008-s0", "n000016-s0")),
    ]
    assert [p["nll"] for p in result["points"]] == [p["nll"] for p in swept[1]["points"]]
    assert (result["kept"]["n"], result["optimum"]) == (swept[1]["kept"]["n"], swept[1]["optimum"])
    assert steps["optimum"]["n"] == min(steps["points"], key=lambda p: p["nll"])["n"]
    assert result["settings"]["mode"] == "both" and result["settings"]["fit"]["max_steps"] == 0


def test_a_point_that_fails_is_named_and_the_finished_ones_are_kept(swept, base, data, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(swept[0], out)
    before = times(out)
    with pytest.raises(UserError, match="20 samples: training samples: 1 problem") as caught:
        run_sweep(base, data, out, replace(SETTINGS, counts=(8, 16, 20)))
    assert "sample train18 has no completion token" in str(caught.value)
    assert "Finished points are kept: n000008-s0, n000016-s0." in caught.value.hint
    assert times(out) == before


def test_a_failed_point_stops_the_sweep_with_its_reason(base, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        run_sweep(broken, data, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "sweep.json").exists()
    assert list((tmp_path / "out" / "points").glob("n*")) == []
    assert states(tmp_path / "out") == {TrialState.FAIL}


def test_a_database_that_goes_away_in_mid_sweep_is_a_sentence(base, data, tmp_path, monkeypatch):
    def lost(*_, **__):
        with sqlite3.connect(tmp_path / "team.db") as database:
            database.execute("DROP TABLE trials")
        return iter(())

    monkeypatch.setenv("TSUGIKI_STORAGE", f"sqlite:///{tmp_path}/team.db")
    monkeypatch.setattr(module, "run_tasks", lost)
    with pytest.raises(UserError, match=r"the database sqlite:////.*team\.db cannot be used: no such table"):
        run_sweep(base, data, tmp_path / "out", SETTINGS)


# --- refusals -------------------------------------------------------------------------------------------------


def test_too_few_samples_are_refused_with_both_numbers(base, data, tmp_path):
    with pytest.raises(UserError, match=r"20 training samples, the smallest count is 250"):
        run_sweep(base, data, tmp_path, SweepSettings())


@pytest.mark.parametrize("wrong", [{"mode": "tokens"}, {"mode": "steps", "fit": replace(FIT, max_steps=5)}, {"mode": "both", "fit": replace(FIT, max_steps=5)}, {"search": "random"}, {"counts": ()}, {"counts": (0, 8)}, {"counts": (8, 8)}, {"seeds": ()}, {"seeds": (1, 1)}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SweepSettings(**wrong)
