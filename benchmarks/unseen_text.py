"""What does a pretrained model score on text that its run never saw, hold-out included?

    python benchmarks/unseen_text.py runs/pretrain-... --text 'FOLDER/*.parquet'

Cleans and tokenizes the text with the model's own tokenizer, packs it, freezes the masks of 15 % of its tokens and
prints the masked-LM loss and accuracy beside the unigram cross-entropy: what the word frequencies of the *training*
text score at the same positions. Meant to be used once a recipe is settled; tuning belongs to the run's hold-out.
Writes results/unseen_text_<fingerprint>-<date>.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import machine, write_result

from bertpipe import artifact
from bertpipe.config import Config
from bertpipe.model import encoders
from bertpipe.model.objectives import OBJECTIVES
from bertpipe.pipeline import Pipeline
from bertpipe.train.evaluation import Evaluation, unigram_cross_entropy
from bertpipe.train.place import Place

HOLDOUT = 0.995  # the part that is scored; the corpus stage wants some documents on the other side, too


def trained_on(run: Path) -> Path:
    """The shards that a pretrain artifact was trained on, which lie beside it."""
    fingerprint = artifact.read_manifest(run)["parents"]["shards"]
    return run.parent / f"shards-{fingerprint[:12]}"


def score(run: Path, text: list[str], lines: bool, threads: int | None, work: Path) -> dict[str, float]:
    """Loss, accuracy and unigram cross-entropy (nats) of the model of a pretrain artifact on the files `text`."""
    from bertpipe.data.shards import TokenShards

    manifest = artifact.read_manifest(run)
    train = {**manifest["settings"]["train"], "eval_tokens": 10**9}
    model = {"init": str(run / "model")}
    corpus = {"sources": text, "holdout": HOLDOUT, "txt_documents": "line" if lines else "file"}
    runtime = {"root": str(work), "threads": threads, "progress": False}
    sections = {"corpus": corpus, "tokenizer": {"adopt": str(run / "model")}, "model": model, "train": train}
    cfg = Config.model_validate(sections | {"runtime": runtime})
    pipeline = Pipeline(cfg)
    for stage in ("corpus", "tokenizer", "shards"):
        pipeline.run(stage)
    shards = TokenShards(pipeline.locate("shards"), "holdout")
    place = Place(cfg.runtime, cfg.train.precision)
    row = OBJECTIVES[cfg.train.objective]
    stock = encoders.build(
        cfg.model, shards.vocab_size, shards.special_ids, cfg.train.sequence_length, 0, row.auto_class
    )
    encoders.make_packed(stock)
    evaluation = Evaluation(cfg, pipeline.locate("shards"), row.module(stock, place.precision).to(place.device), place)
    if not evaluation.slots:
        raise SystemExit(f"{', '.join(text)}: too little text to score")
    figures = evaluation()
    counts = TokenShards(trained_on(run), "train").unigrams
    return {
        "documents": shards.num_documents,
        "tokens": shards.num_tokens,
        "loss": figures["eval_loss"],
        "accuracy": figures["eval_accuracy"],
        "unigram_cross_entropy": unigram_cross_entropy(counts, evaluation.slots),
    }


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("run", type=Path, help="a pretrain-... folder, its shards beside it")
    reader.add_argument("--text", nargs="+", required=True, help="files or globs, as corpus.sources takes them")
    reader.add_argument("--lines", action="store_true", help="a document a line of .txt files, not a file")
    reader.add_argument("--threads", type=int, help="default: all cores")
    reader.add_argument("--out", type=Path, help="folder for the JSON (default: results/)")
    options, before = reader.parse_args(), machine()
    with tempfile.TemporaryDirectory() as folder:
        facts = score(options.run, options.text, options.lines, options.threads, Path(folder))
    print(
        f"{facts['documents']:,} documents, {facts['tokens']:,} tokens: loss {facts['loss']:.3f} nats, "
        f"{facts['unigram_cross_entropy'] - facts['loss']:.3f} below the unigram cross-entropy of "
        f"{facts['unigram_cross_entropy']:.3f}; {facts['accuracy']:.1%} of the masked tokens right"
    )
    names = {"run": options.run.name, "text": [Path(name).name for name in options.text]}
    name = f"unseen_text_{options.run.name.removeprefix('pretrain-')}"
    write_result(name, before, names | facts, options.out)


if __name__ == "__main__":
    main()
