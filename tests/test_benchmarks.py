"""The benchmarks run, and what they compare does equal work. No figure of speed is tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bertpipe.data.shards import TokenShards
from bertpipe.model.labelled import HEADS_OF
from tests import torture
from tests.downstream.conftest import TEXT, write_tokenizer
from tests.runs import bertpipe, only, prepare

ROOT = Path(__file__).parents[1]


def run(script: str, out: Path, flags: str) -> tuple[dict, str]:
    """Run a script of benchmarks/ on docstrings; returns its one JSON file and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "BERTPIPE_DATA"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags.split(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_pretrain_speed_compares_equal_work(tmp_path):
    flags = "bert-tiny@32 --tokens-per-step 512 --slot-tokens 256 --rounds 2 --steps 1 --warmup 2 --threads 1 "
    flags += "--characters 600000 --vocab-size 300"
    result, printed = run("pretrain_speed.py", tmp_path, flags)
    sides = result["tables"]["bert-tiny@32"]["sides"]
    assert list(sides) == ["run_mlm", "trainer_best", "bertpipe"]
    for side in sides.values():
        assert side["places_per_step"] == 512 and side["threads"] == 1
        assert side["parameters"] == sides["bertpipe"]["parameters"]
        assert abs(side["mask_rate"] - 0.15) < 0.05, "1,000 tokens or so"
        rate, seconds = side["tokens_per_second"]["values"], side["step_seconds"]["values"]
        tokens = [r * s for r, s in zip(rate, seconds, strict=True)]
        assert len(rate) == 2 and all(500 < t <= 512.1 for t in tokens), "one step each, with next to no padding"
    ours = sides["bertpipe"]["tokens_per_second"]["values"]
    for name in ("run_mlm", "trainer_best"):
        pairs = [mine / theirs for mine, theirs in zip(ours, sides[name]["tokens_per_second"]["values"], strict=True)]
        assert result[f"ratio_bert-tiny_32_vs_{name}"] == pytest.approx(sum(pairs) / 2, rel=1e-4)
        assert name in printed
    ratios = [f"{result[f'ratio_bert-tiny_32_vs_{name}']:.1f} x" for name in ("run_mlm", "trainer_best")]
    (row,) = [line for line in printed.splitlines() if line.startswith("| bert-tiny@32 | 2 |")]
    assert all(ratio in cell for ratio, cell in zip(ratios, row.split("|")[3:5], strict=True))
    run_mlm, best = sides["run_mlm"], sides["trainer_best"]
    assert run_mlm["precision"] == "fp32" and run_mlm["attention"] == "sdpa"
    assert best["precision"] == sides["bertpipe"]["precision"]
    assert {trial["attention"] for trial in best["trials"]} == {"sdpa", "eager"}
    assert 0 < sides["bertpipe"]["share_of_matmul"]["median"] < 1


@pytest.mark.slow
def test_time_to_loss_runs_both_sides_to_one_loss(tmp_path):
    result, printed = run("time_to_loss.py", tmp_path, "--quick --threads 1")
    unigram = result["unigram_cross_entropy"]
    assert f"{unigram:.3f}" in printed
    best = result["trainer"][f"{result['best_lr']:g}"]
    assert best["reached"] and best["loss"] == result["target_loss"] <= unigram
    assert best["seconds"] == min(r["seconds"] for r in result["trainer"].values() if r["reached"])
    ours = result["bertpipe"]
    assert ours["loss"] <= best["loss"] or not ours["reached"]
    assert result["ratio_bert-tiny_32_time_to_loss"] == pytest.approx(best["seconds"] / ours["seconds"], abs=1e-3)
    plain = {"trainer": best, "bertpipe": ours}
    for side, run_ in result["bias_initialised"].items():
        first = run_["curve"][0]
        assert first["step"] == plain[side]["curve"][0]["step"] == 10
        assert first["loss"] < plain[side]["curve"][0]["loss"] - 0.1, "word frequencies are known from the start"


@pytest.mark.slow
def test_processes_speed_times_the_same_steps_on_one_and_two(tmp_path):
    result, printed = run("processes_speed.py", tmp_path, "--quick")
    one, two = result["sides"]["one"], result["sides"]["two"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert "pretrain: 1 process(es) x 1 thread(s)" in printed and "pretrain: 2 process(es) x 1 thread(s)" in printed
    assert one["tokens"] == two["tokens"] and all(0.95 * 2048 < tokens <= 2048 for tokens in one["tokens"])
    pairs = [a / b for a, b in zip(one["step_seconds"]["values"], two["step_seconds"]["values"], strict=True)]
    assert len(pairs) == 2 and result["ratio_two_processes_vs_one"] == pytest.approx(sum(pairs) / 2, rel=1e-4)
    exact = result["sides"]["exact"]
    assert (exact["processes"], exact["reduction"], two["reduction"]) == (2, "exact", "fast")
    prices = [c / b - 1 for b, c in zip(two["step_seconds"]["values"], exact["step_seconds"]["values"], strict=True)]
    assert result["price_of_exact"] == pytest.approx(sum(prices) / 2, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_unseen_text_is_scored_beside_the_frequencies_of_the_training_text(tmp_path):
    """Text of one word only: at every masked position its unigram cross-entropy is that word's, reckoned here."""
    config = prepare(tmp_path)
    for stage in ("corpus", "tokenizer", "shards", "pretrain"):
        bertpipe(stage, "--config", config)
    runs = tmp_path / "runs"
    text = tmp_path / "unseen.txt"
    text.write_text("\n".join(f"{'the ' * number}the" for number in range(2, 202)))
    flags = f"{only(runs, 'pretrain')} --text {text} --lines"
    result, printed = run("unseen_text.py", tmp_path / "out", flags)
    counts = TokenShards(only(runs, "shards"), "train").unigrams
    entry = json.loads((only(runs, "tokenizer") / "tokenizer.json").read_text())["model"]["vocab"]["the"]
    expected = math.log((counts.sum() + len(counts)) / (counts[entry] + 1))
    assert result["unigram_cross_entropy"] == pytest.approx(expected, abs=1e-6)
    assert f"unigram cross-entropy of {expected:.3f}" in printed
    assert 190 <= result["documents"] <= 200
    assert 0 < result["loss"] < math.log(len(counts)) and 0 <= result["accuracy"] <= 1


@pytest.mark.slow
def test_checkpoint_cost_compares_windows_with_and_without_a_save(tmp_path):
    result, printed = run("checkpoint_cost.py", tmp_path, "--quick --threads 1")
    with_save, without = (result[f"window_seconds_{name}"]["values"] for name in ("with", "without"))
    costs = [a - b for a, b in zip(with_save, without, strict=True)]
    assert len(costs) == len(result["copy_seconds"]["values"]) == len(result["write_seconds"]["values"]) == 2
    assert result["share_every_5_minutes"] == pytest.approx(sum(costs) / 2 / 300, abs=1e-6)
    assert result["bytes"] > 3 * 4 * 500_000, "weights and two moments"
    assert f"{result['bytes']:,} bytes a checkpoint" in printed


@pytest.mark.slow
def test_tracker_cost_compares_windows_with_and_without_trackers(tmp_path):
    result, printed = run("tracker_cost.py", tmp_path, "--quick --threads 1")
    assert list(result["rows"]) == ["wandb + tensorboard + trackio", "hangs", "10 s a line", "fails"]
    for name, row in result["rows"].items():
        cost = [
            a - b
            for a, b in zip(row["window_seconds_with"]["values"], row["window_seconds_without"]["values"], strict=True)
        ]
        assert row["cost_seconds"]["values"] == pytest.approx(cost, abs=1e-4) and len(cost) == 2
        assert row["record_complete"] and row["steps"] == 90
        assert row["exit_seconds"] < 30 and (row["exit_seconds"] > 19) == (name in ("hangs", "10 s a line"))
        assert f"| {name} | {row['share']:+.2%} |" in printed


def test_plan_start_gives_a_step_drawn_at_random_and_torture_can_read_it(tmp_path):
    result, printed = run("plan_start.py", tmp_path, "--tokens 3000000 --starts 2")
    assert result["steps"] == 3_000_000 // 32_768 and "3,000,000 tokens" in printed
    seconds = result["seconds"]
    assert 0 < seconds["first_step"]["median"] < seconds["all"]["median"]
    figures = {"plan_start": seconds, "checkpoint_cost": 0.004, "processes_speed": 0.1}
    table = torture.rows({"speed": figures})
    assert [seen for _, _, seen in table] == [f"{seconds['all']['median']:.2f} s", "0.40%", "+10.0%"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A checkpoint of a tiny BERT without a head, and a task of 70 and 20 sentences: whether they say `not`."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import transformers as tr

    folder, rng = tmp_path_factory.mktemp("sentences"), np.random.default_rng(0)
    tokenizer = write_tokenizer(folder / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    tr.BertModel(tr.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    (folder / "data" / "sst2").mkdir(parents=True)
    for split, num in (("train", 70), ("validation", 20)):
        rows = [rng.choice(TEXT.split(), rng.integers(2, 30)).tolist() for _ in range(num)]
        labels = ["not" in row for row in rows]
        table = {"sentence": [" ".join(row) for row in rows], "label": np.array(labels, np.int64)}
        parquet.write_table(pa.table(table), folder / "data" / "sst2" / f"{split}.parquet")
    return f"--model {folder / 'model'} --data {folder / 'data'} --threads 1"


def test_the_losses_of_every_head_are_those_of_trainer(tmp_path):
    result, printed = run("finetune_losses.py", tmp_path, "--threads 1")
    assert {facts["head"] for facts in result["heads"].values()} == set(HEADS_OF)
    assert {"regression", "multi-label"} < set(result["heads"]), "the other losses of whole sequences"
    for name, facts in result["heads"].items():
        assert len(facts["bertpipe"]) == len(facts["trainer"]) == 50
        np.testing.assert_allclose(facts["bertpipe"], facts["trainer"], rtol=0, atol=1e-5, err_msg=name)
        assert facts["last_loss"] < facts["first_loss"] - 1e-3, f"{name} learnt something"
        assert f"| {name} |" in printed


@pytest.mark.slow
def test_paired_seeds_are_compared_and_kept(sentences, tmp_path):
    flags = f"{sentences} --tasks sst2 --epochs 2 --examples 64 --lr 1e-3 --precision fp32 --seeds "
    result, _ = run("finetune_scores.py", tmp_path, flags + "2")
    first = result["runs"]["sst2"]
    assert first.keys() == {"1", "2"} and all(pair.keys() == {"bertpipe", "trainer"} for pair in first.values())
    assert all(run_["num_examples"] == 64 for pair in first.values() for run_ in pair.values())
    result, printed = run("finetune_scores.py", tmp_path, flags + "3")
    kept = result["runs"]["sst2"]
    assert kept.keys() == {"1", "2", "3"} and all(kept[seed] == first[seed] for seed in first), "none ran again"
    differences = [pair["bertpipe"]["score"] - pair["trainer"]["score"] for pair in kept.values()]
    task = result["tasks"]["sst2"]
    assert task["pairs"] == 3 and task["difference"] == pytest.approx(np.mean(differences))
    half = 4.302653 * np.std(differences, ddof=1) / 3**0.5  # Student's t of 2 degrees of freedom
    assert task["interval"] == pytest.approx([np.mean(differences) - half, np.mean(differences) + half], abs=1e-6)
    assert "| sst2 | accuracy | 3 |" in printed


@pytest.mark.slow
def test_finetune_speed_compares_equal_work(sentences, tmp_path):
    flags = f"sst2@64 {sentences} --rounds 2 --batch-size 16 --max-length 64"
    result, printed = run("finetune_speed.py", tmp_path, flags)
    (table,) = result["tables"].values()
    sides = table["sides"]
    assert list(sides) == ["run_glue", "trainer_best", "bertpipe"]
    for side in sides.values():
        assert (side["steps"], side["examples"], side["threads"]) == (4, 64, 1)
        assert side["tokens"] == sides["bertpipe"]["tokens"] and side["eval_seconds"] > 0
    assert sides["run_glue"]["fill"] == pytest.approx(sides["run_glue"]["tokens"] / (64 * 64))
    assert sides["run_glue"]["fill"] < sides["trainer_best"]["fill"] < sides["bertpipe"]["fill"] == 1
    assert sides["run_glue"]["precision"] == "fp32" and sides["run_glue"]["attention"] == "sdpa"
    assert set(sides["trainer_best"]["trials"]) == {"sdpa", "eager"}
    ours = sides["bertpipe"]["epoch_seconds"]["values"]
    for name in ("run_glue", "trainer_best"):
        pairs = [theirs / mine for mine, theirs in zip(ours, sides[name]["epoch_seconds"]["values"], strict=True)]
        assert result[f"ratio_model sst2@64_vs_{name}"] == pytest.approx(sum(pairs) / 2, rel=1e-4)
        assert f"{table['ratios'][name]['median']:.1f} x" in printed
