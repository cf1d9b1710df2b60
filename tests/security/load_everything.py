"""Load every kind of artifact twice, the second time under an audit hook: run by test_whole_run.py in its own process.

    python -m tests.security.load_everything CLEAN PLANTED DATA

Prints, as JSON, what was loaded from PLANTED and each event of the kinds that no load may cause. The first time, from
CLEAN, brings in all modules, whose own bytecode is unmarshalled and run: that is importing, not loading.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.data import tokenizer
from bertpipe.data.corpus import read_documents
from bertpipe.data.shards import TokenShards
from bertpipe.downstream.finetuning import start_checks
from bertpipe.downstream.publishing import publish
from bertpipe.downstream.reporting import facts, report
from bertpipe.downstream.tasks import tasks
from bertpipe.errors import BertpipeError
from bertpipe.model import encoders
from bertpipe.train import pretrain
from bertpipe.train.checkpoint import Checkpoints
from bertpipe.train.optim import Optimizer
from tests.runs import only

WATCHED = ("pickle.", "marshal.", "exec", "compile", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")
WATCHED += ("os.spawn", "socket.connect", "socket.getaddrinfo", "socket.sendto", "ctypes.dlopen", "urllib.Request")


def load(root: Path, data: str, out: Path) -> dict[str, int]:
    """Everything that stages read; how much of each there was."""
    stages = {stage: only(root, stage) for stage in facts.STAGES}
    model = str(stages["pretrain"] / "model")
    cfg = Config(**artifact.read_manifest(stages["pretrain"])["config"])
    loaded = {"documents": sum(1 for _ in read_documents(stages["corpus"], "train"))}
    loaded["pieces"] = tokenizer.load(stages["tokenizer"]).get_vocab_size()
    loaded["special"] = len(tokenizer.read_special_ids(stages["tokenizer"])[0])
    stock = pretrain.load_tokenizer(stages["tokenizer"])
    loaded["added"] = len(pretrain.check_tokenizer(model, stock))
    loaded["adopted"] = len(tokenizer.adopt(Config(tokenizer={"adopt": model}).tokenizer))
    shards = TokenShards(stages["shards"], "train")
    loaded["tokens"] = len(shards.tokens(0))
    network = encoders.load(AutoModelForMaskedLM, model, "model.init")
    loaded["parameters"] = encoders.count_parameters(network)
    newest = max((stages["pretrain"] / "checkpoints").glob("step-????????"))
    state = Checkpoints.restore(newest, network, Optimizer(network, pretrain.recipe(cfg)))
    loaded["step"] = state["step"]
    task = next(path for path in stages["finetune"].iterdir() if path.is_dir())
    start_checks.load_tokenizer_of(str(task / "model"))
    encoders.load(AutoModelForSequenceClassification, str(task / "model"), "finetune.model")
    loaded["examples"] = len(tasks.load(task.name, data)["train"])
    loaded["facts"] = len(facts.gather(cfg, stages))
    loaded["fillings"] = len(report.fill_masks(stages["pretrain"] / "model", ["the [MASK] sees the house ."]))
    loaded["segments"] = len(report.segment(stages["tokenizer"], ["the house"]))
    out.mkdir()
    publish.copy_model(stages["pretrain"] / "model", out)
    loaded["published"] = len(list(out.iterdir()))
    for folder in stages.values():
        artifact.verify(folder)
    return loaded


def main(clean: str, planted: str, data: str) -> None:
    """Warm up, watch, load, report."""
    load(Path(clean), data, Path(clean) / "published")
    events: list[str] = []
    armed = True

    def hook(event: str, arguments: tuple) -> None:
        parsed = event == "compile" and arguments[1] == "<unknown>"  # of ast.literal_eval: a .npy header, never run
        if armed and event.startswith(WATCHED) and not parsed:
            events.append(f"{event} {str(arguments)[:300]}")

    sys.addaudithook(hook)
    try:
        loaded: dict | str = load(Path(planted), data, Path(planted) / "published")
    except BertpipeError as error:
        loaded = str(error)
    armed = False
    print(json.dumps({"loaded": loaded, "events": events}))


if __name__ == "__main__":
    main(*sys.argv[1:])
