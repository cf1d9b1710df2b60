"""Runs of families that are padded inside `encode`: announced, resumed bit for bit, stock when done, estimated."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tr

from bertpipe import cli
from bertpipe.data.shards import TokenShards
from bertpipe.errors import ConfigError
from bertpipe.model import encoders, kernels
from bertpipe.model.objectives import MaskedLM
from bertpipe.train import estimate
from bertpipe.train.evaluation import Evaluation
from bertpipe.train.place import Place
from tests.train.test_estimate import config as estimated
from tests.train.test_pretrain import ROOT, TWO, config, inputs, interrupted, lines, run, same  # noqa: F401

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PRESETS = {"deberta-base": "deberta", "deberta-v3-base": "deberta-v2", "bigbird-base": "big_bird"}


def of(preset: str, train: dict | None = None, **runtime):
    base = config(train)
    model = base.model.model_copy(update={"preset": preset, "overrides": SMALL, "dropout": 0.1})
    return base.model_copy(update={"model": model, "runtime": base.runtime.model_copy(update=runtime)})


@pytest.mark.parametrize(("preset", "kind"), PRESETS.items())
def test_a_run_says_that_it_is_padded_and_ends_in_a_stock_folder(preset, kind, inputs, tmp_path, capsys):  # noqa: F811
    cfg = of(preset)
    kernels.say_once.cache_clear()
    counts = run(cfg, inputs, tmp_path / "whole")
    out = capsys.readouterr().out
    assert f"note: {kind} runs padded, bucketed by length: " in out and f"fp32, padded | {kind}, " in out
    assert counts["attention"] == "padded"
    folder = tmp_path / "whole" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    stock, info = tr.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and type(stock).__module__.startswith("transformers.models.")
    again = stock_evaluation(cfg, stock, inputs)
    assert again == pytest.approx(counts["eval_loss"], abs=1e-5)
    run(cfg, inputs, interrupted(tmp_path / "whole", 3, tmp_path / "resumed"))
    same(tmp_path / "whole", tmp_path / "resumed")


class Alone(MaskedLM):
    """The loss from the stock forward of one sequence at a time."""

    def losses(self, batch, factors=None):
        logits = []
        for first, last in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            logits.append(self.model(input_ids=batch.input_ids[:, first:last]).logits[0])
        chosen = torch.cat(logits)[batch.predict_index]
        loss = torch.nn.functional.cross_entropy(chosen, batch.predict_labels, reduction="none")
        right = (chosen.argmax(-1) == batch.predict_labels).float()
        weight = batch.predict_weight
        return {"loss": (loss * weight).sum(), "correct": (right * weight).sum(), "count": weight.sum()}


def stock_evaluation(cfg, stock, inputs) -> float:  # noqa: F811
    """The hold-out loss of a stock model, sequence by sequence."""
    place = Place(cfg.runtime, "fp32")
    evaluation = Evaluation(cfg, inputs["shards"], Alone(stock.eval()), place)
    assert TokenShards(inputs["shards"], "holdout").num_tokens > 0 and evaluation.slots
    return evaluation()["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_two_processes_see_one_processs_losses(preset, inputs, tmp_path):  # noqa: F811
    """Their slots fall into other numbers of blocks, and no parameter goes without a gradient."""
    cfg = of(preset, {"sequence_length": 64, "slot_tokens": 128})
    run(cfg, inputs, tmp_path / "one")
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(tmp_path / "two.py"), cfg.model_dump_json(), str(inputs["shards"].parent), str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), abs=1e-4)


def test_a_fast_kernel_that_is_required_stops_the_run(inputs, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=r"^runtime\.require_fast_attention: deberta-v2 runs padded"):
        run(of("deberta-v3-base", require_fast_attention=True), inputs, tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_activations_are_estimated_as_of_other_families(preset):
    cfg = estimated(model={"preset": preset, "overrides": SMALL | {"num_hidden_layers": 3}})
    counted = estimate.count_activations(estimate.on_meta(cfg, 600), "fp32", 32, 0.15)
    model = encoders.build(cfg.model, 600, estimate.SPECIAL_IDS, 32, 0)
    assert encoders.count_parameters(model) == encoders.count_parameters(estimate.on_meta(cfg, 600))
    objective = MaskedLM(encoders.make_packed(model)).train()
    real = estimate._kept_bytes(objective, estimate.random_batch(256, 32, 600))
    assert counted.of(256) - counted.logits(256) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_estimate_answers(preset, capsys):
    flags = ["--train.steps", "10", "--train.slots_per_step", "2", "--train.slot_tokens", "256", "--model.preset"]
    flags += [preset, "--tokenizer.vocab_size", "600", "--runtime.threads", "1", "--runtime.device", "cpu"]
    flags += ["--model.overrides", json.dumps(SMALL), "--measure"]
    assert cli.main(["estimate", *flags]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[1] == PRESETS[preset] + "," and "s a slot of 256 (128)" in printed[4]
