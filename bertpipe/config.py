"""Every setting, as one tree of pydantic models.

Sections decide results, so they enter fingerprints; `runtime` alone changes only speed or place and stays out.
config_files.py reads the tree from YAML files and flags.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bertpipe.config_parts import Count, Decay, Epochs, Phase, PublishConfig, Ramp, Rate, ReportConfig, Section, listed

__all__ = ["Phase", "PublishConfig", "Ramp", "ReportConfig", "Section", "listed"]


class CorpusConfig(Section):
    """Raw text -> cleaned, deduplicated documents."""

    sources: str | list[str] = "docs"
    """Where text comes from: globs of .txt, .jsonl or .parquet files (plain, .gz or .zst), `hub:NAME[:CONFIG[:SPLIT]]`
    for a Hub dataset, or `docs`, the documentation of the installed Python packages."""
    text_key: str = "text"
    """Column (parquet, Hub) or key (jsonl) that holds a document's text."""
    txt_documents: Literal["file", "line"] = "file"
    """In .txt files, whether a document is a whole file or one line."""
    on_error: Literal["raise", "skip"] = "raise"
    """On a record that can't be read: stop with file and offset, or count it as skipped and go on."""
    min_chars: int = Field(default=20, ge=1)
    """Shorter documents are skipped (counted), in characters after cleaning."""
    max_chars: int = Field(default=1_000_000, ge=1)
    """Longer documents are skipped (counted), in characters after cleaning."""
    deduplicate: bool = True
    """Drop documents whose cleaned text was seen before."""
    holdout: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents (for `docs`, of the source files) kept for evaluation, chosen by content hash."""
    shard_bytes: int = Field(default=256_000_000, ge=1)
    """Text bytes (UTF-8) of one output parquet file, at most; a unit's last file is smaller."""


class TokenizerConfig(Section):
    """Train a WordPiece vocabulary, or adopt one."""

    adopt: str | None = None
    """Use an existing tokenizer instead of training: a vocab.txt, a folder or a Hub id."""
    vocab_size: int = Field(default=30_522, ge=32)
    """Size of the trained vocabulary, special tokens included."""
    lowercase: bool = True
    """Uncased (true) or cased."""
    strip_accents: bool | None = None
    """Remove combining marks; unset follows `lowercase`, as BERT does. Deletes the vowel signs of Indic and other
    scripts, so set it to false for them (a warning says when it matters)."""
    min_frequency: int = Field(default=2, ge=1)
    """A piece must occur this often to be learnt."""
    limit_alphabet: int = Field(default=6_000, ge=1)
    """Distinct characters kept; the rest become [UNK]."""
    sample_bytes: int = Field(default=200_000_000, ge=1)
    """Text read for training, in UTF-8 bytes at most: a seeded sample of the documents, which bounds the memory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of that sample."""
    model_max_length: int = Field(default=512, ge=3)
    """Longest input in tokens, special tokens included, written into the tokenizer."""
    add_tokens: int = Field(default=0, ge=0)
    """Words of the corpus to add to an adopted WordPiece vocabulary: those that occur `min_frequency` times or more and
    save the most tokens. `model.init` then grows the checkpoint's embeddings."""


class ShardsConfig(Section):
    """Documents -> memory-mapped token ids."""

    shard_tokens: int = Field(default=32_000_000, ge=1)
    """Tokens of one shard, at most (a single longer document makes a longer shard)."""
    language: str = "en"
    """ISO 639 code that the sentence splitter (sentencex) uses."""


class ModelConfig(Section):
    """Which stock encoder."""

    preset: str = "bert-mini"
    """A file of configs/model/, without .yaml: bert-tiny, -mini, -small, -medium, -base, -large, albert-base,
    bigbird-base, deberta-base, deberta-v3-base, distilbert-base, electra-base, eurobert-210m, modernbert-mini, -base,
    roberta-base."""
    init: str | None = None
    """Go on from this checkpoint (folder or Hub id) instead of random weights; `preset` is then not used."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of every layer and of attention; unset keeps the preset's."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the stock `transformers` config, e.g. {hidden_act: gelu_new}."""
    max_positions: int | None = Field(default=None, ge=8)
    """Longest sequence the model takes, in tokens; unset keeps the preset's or checkpoint's. A checkpoint's learnt
    positions are interpolated to it, its rotary ones scaled."""


class MaskingConfig(Section):
    """Which positions are predicted, and what is shown there (Devlin et al. 2019, section 3.1)."""

    strategy: str = "token"
    """token; whole_word; or span: spans of 1 to 10 whole words, 3.8 in the mean (SpanBERT)."""
    probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens to predict, at the first step where it changes. Evaluation always masks 15 %."""
    schedule: str = "constant"
    """constant, or linear: from `probability` at the first step to `final_probability` at the last (0.3 to 0.15)."""
    final_probability: float | None = Field(default=None, gt=0, lt=1)
    """Share of the tokens to predict at the last step, where the schedule is not constant."""
    mask_share: float = Field(default=0.8, ge=0, le=1)
    """Of the predicted positions, the share shown as [MASK]."""
    random_share: float = Field(default=0.1, ge=0, le=1)
    """Of the predicted positions, the share shown as a random token; the rest is shown unchanged."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule of pretraining."""

    name: str = "muon"
    """adamw; muon: torch.optim.Muon on the encoder's matrices, AdamW on the rest; lamb, stableadamw: with the extra
    `[optim]`."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate, of Muon's matrices excepted."""
    muon_lr: float = Field(default=0.02, gt=0)
    """Peak learning rate of Muon."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; biases and layer norms get none."""
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Moment decays; Muon's matrices have `momentum`."""
    eps: float = Field(default=1e-6, gt=0)
    """Epsilon of the second moment's root; Muon's matrices excepted."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global L2 norm."""
    schedule: str = "linear"
    """Shape after the warmup: linear, constant, cosine, inverse_sqrt, or wsd (a plateau, then a cooldown)."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear warmup."""
    decay_share: float = Field(default=0.2, ge=0, le=1)
    """wsd: share of the steps, at the end, that the cooldown takes."""
    cooldown: Literal["1-sqrt", "linear"] = "1-sqrt"
    """wsd: shape of the cooldown."""


class TrainConfig(Section):
    """The pretraining run."""

    objective: str = "mlm"
    """mlm: masked-language modelling; mlm_nsp: and next-sentence prediction, as BERT; mlm_sop: and sentence order, as
    ALBERT. The latter two train the pooler."""
    steps: int = Field(default=10_000, ge=1)
    """Optimizer steps; not read when `budget` is set."""
    budget: str | int | None = None
    """Train for this time instead, e.g. 90m, 6h, 1.5d: some steps are measured first, the number that fits is frozen in
    the run, and the schedule ends inside the time, which counts from the start of the stage."""
    extend_from: str | None = None
    """Go on from this run (a pretrain-... folder, or the .partial one of an unfinished run, left alone meanwhile), its
    optimizer and its place in the data, to a larger number of steps in all; the recipe must be the same but for steps,
    budget, schedule, warmup and cooldown."""
    extend_changed: bool = False
    """With extend_from: go on although the recipe, the corpus or the tokenizer changed; what did is printed and written
    into the manifest."""
    source_weights: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=list)
    """Mix the sources: a number for each entry of `corpus.sources`, in order, which is its share of the tokens trained
    on, e.g. [3, 1] for three quarters of the first (of pairs roughly so); 0 leaves one out. Unset, each counts by
    its size."""
    sequence_length: int = Field(default=128, ge=8)
    """Longest sequence in tokens, [CLS] and [SEP] included."""
    slot_tokens: int = Field(default=8_192, ge=8)
    """Tokens of one slot, the packed row of one forward and backward on one process."""
    slots_per_step: int = Field(default=4, ge=1)
    """Slots of one optimizer step over all processes; the number of processes must divide it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, order, masks and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products; auto takes bf16 where the hardware multiplies it faster. Weights stay fp32."""
    eval_every: int = Field(default=500, ge=1)
    """Steps between evaluations on the hold-out; the last step is always evaluated."""
    eval_tokens: int = Field(default=200_000, ge=1)
    """Hold-out tokens of one evaluation, at most."""
    phases: list[Phase] = Field(default_factory=list)
    """Parts of the run with sequence lengths of their own, in order, e.g. [{share: 0.9, sequence_length: 128}, {share:
    0.1, sequence_length: 512}]. The hold-out is evaluated at train.sequence_length throughout."""
    batch_warmup: list[Ramp] = Field(default_factory=list)
    """Smaller steps at the start, in order, e.g. [{steps: 500, slots: 8}, {steps: 500, slots: 16}]; then
    train.slots_per_step. Every number of slots must be a multiple of the first one."""
    reduction: Literal["fast", "exact"] = "fast"
    """How the slots' gradients are added up. fast: DistributedDataParallel; other numbers of processes differ in the
    last bits. exact: each slot's alone, in one fixed order, so that any number of processes gives the same bits; for
    its memory see `bertpipe estimate`."""
    max_skipped: int = Field(default=5, ge=1)
    """A step whose loss or gradient is not finite is skipped; so many in a row stop the run."""
    spike_deviations: float = Field(default=0.0, ge=0)
    """Also skip a step whose loss is so many standard deviations above its running mean, `max_skipped` in a row at
    most; 0 skips none. 6 is a common value."""


class TaskConfig(Section):
    """A task of your own, a table with columns of text and of labels; it runs beside finetune.tasks."""

    kind: str
    """classification (one class a row), multi_label (any number), regression, or another form in the task table."""
    data: dict[str, str] | str
    """A .csv, .tsv, .json, .jsonl, .conll or .parquet file (text also .gz, .zst); {train: FILE, validation: FILE,
    test: FILE}; or a folder of files with these names. Only train must be there."""
    text: str | list[str]
    """Column of the text, or both columns of a pair; of other forms their columns, as their tasks in the table."""
    label: str | list[str]
    """Column of the label; for multi_label lists, or several columns of 0 and 1. Where validation or test have no
    labels at all they are predicted, not scored."""
    name: str | None = None
    """What to call it and its folder; unset, the name of the file or folder."""
    label_separator: str | None = None
    """multi_label: what stands between labels in one column of text, e.g. ";"."""
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Without validation data: the share of the different texts of train held out for it, chosen by content."""
    encoding: str = "utf-8"
    """Of files of text, e.g. cp1252 or utf-16."""
    delimiter: str | None = None
    """The character between the fields of a line; unset, a comma, in .tsv a tab, in .conll a tab or spaces."""
    quotes: bool = True
    """Whether a field of .csv or .tsv may stand in double quotes; false takes them for text, as in GLUE's own files."""


class FinetuneConfig(Section):
    """Fine-tuning and scoring."""

    tasks: str | list[str] | None = None
    """Rows of the task table: GLUE's cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, SuperGLUE's boolq, cb, wic,
    copa; swag; conll2003, wnut17; squad, squad_v2; docs; or all: whatever of these `data` holds, or without it GLUE.
    Unset, `task` alone, or where it is unset too docs."""
    task: TaskConfig | None = None
    """A task of your own, e.g. {kind: classification, data: my.csv, text: [title, body], label: topic}."""
    data: str | None = None
    """Folder laid out <task>/{train,validation,test}.parquet; for squad and squad_v2 also the official JSON, a folder
    or as one file; unset loads the tasks' data sets from the Hub."""
    model: str | None = None
    """Checkpoint to fine-tune (folder or Hub id), its head too where it is for as many labels; unset takes this run's
    pretrained model."""
    seeds: int | list[int] = 3
    """Runs a task: a number n (seeds 1..n) or the seeds themselves."""
    baselines: str | list[str] = Field(default_factory=list)
    """Compared on the same data: majority, tfidf (classification), scratch (the same recipe from random weights)."""
    epochs: Epochs | list[Epochs] = 3
    """Passes over the training set; 0 scores a model that has its head already as it is. Several values of epochs,
    batch_size and lr, e.g. lr: [2e-5, 3e-5, 5e-5], make a grid; for each task the point with the best median over the
    seeds on validation is chosen."""
    batch_size: Count | list[Count] = 32
    """Examples of one optimizer step over all processes; one or several."""
    slots_per_step: int = Field(default=1, ge=1)
    """Packed rows a batch is spread over; the number of processes must divide it."""
    lr: Rate | list[Rate] = 5e-5
    """Peak learning rate (AdamW, linear schedule); one or several."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better score on validation after which a run ends; unset runs them all. The schedule stays that
    of all `epochs`."""
    warm_start: str | None = None
    """Let rte, mrpc and stsb start from the best model of this task, which must be among `tasks` (mnli, as a rule), or
    from a checkpoint (folder or Hub id); their heads are new."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps spent on linear warmup."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; biases and layer norms get none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global L2 norm."""
    max_length: int = Field(default=128, ge=8)
    """Longest input in tokens; longer ones are cut (counted), the longer side of a pair first, or go into windows."""
    stride: int | None = Field(default=None, ge=0)
    """Tokens that neighbouring windows of a long text share (tokens, answers); unset: a third of max_length."""
    max_query_length: int = Field(default=64, ge=1)
    """Longest question in tokens, at most half the input; longer ones are cut (question answering)."""
    max_answer_length: int = Field(default=30, ge=1)
    """Longest answer in tokens (question answering)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout while fine-tuning; unset keeps the checkpoint's."""
    pooler: Literal["random", "identity"] = "random"
    """How a pooler that the checkpoint lacks starts: random as in stock classes, or giving the head tanh of [CLS]."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As train.precision."""


def named_tasks(settings: FinetuneConfig) -> list[str]:
    """The entries of `finetune.tasks`, which unset is none beside `finetune.task`, and else docs."""
    if settings.tasks is None:
        return [] if settings.task else ["docs"]
    return listed(settings.tasks)


class RuntimeConfig(Section):
    """Speed and place; never the result."""

    root: str = "runs"
    """Folder that holds every artifact."""
    workers: int | None = Field(default=None, ge=1)
    """Processes of the data stages; unset uses every core."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads a process; unset shares the cores among the processes of this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run."""
    loader_workers: int = Field(default=0, ge=0)
    """Processes that prepare batches for each training process; 0 prepares them in line."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of speed.jsonl and updates of the trackers."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints to keep, at least two."""
    progress: bool = True
    """Show progress bars."""
    trackers: str | list[str] = Field(default_factory=list)
    """Where figures of pretraining and fine-tuning are shown beside their files: wandb (offline without a key),
    tensorboard, trackio; one or several. `bertpipe dashboard` opens the last two."""
    project: str = "bertpipe"
    """Project of wandb and trackio that the run stands in."""
    require_fast_attention: bool = False
    """Stop before the first step where attention would run on a slow kernel (a GPU with attention dropout, fp32, or
    without FlashAttention; deberta and big_bird, which run padded); unset says so and goes on."""
    compile: bool | Literal["auto"] = "auto"
    """Compile pretraining's forward and backward with torch.compile; auto does on CUDA where they make one graph."""
    profile: int = Field(default=0, ge=0)
    """Steps of pretraining to trace, after two: into profile/ of the run, the ten largest costs printed. 0: none;
    `bertpipe pretrain --profile` means 3."""
    timeout: int = Field(default=1_800, ge=1)
    """Seconds that processes of a run wait for one another before they take one for lost, name it and end."""
    desync_every: int = Field(default=100, ge=0)
    """Steps between comparisons of the weights that the processes hold; 0: never."""
    checkpoint_failures: int = Field(default=0, ge=0)
    """Checkpoints in a row that may fail to be written, on a full disk say, before the run stops."""
    hub_patience: int = Field(default=60, ge=0)
    """Seconds to go on trying, in all, while the Hub is busy, fails or can't be reached."""


class Config(Section):
    """The whole tree; each stage is given the sections it declares."""

    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    shards: ShardsConfig = ShardsConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    report: ReportConfig = ReportConfig()
    publish: PublishConfig = PublishConfig()
    runtime: RuntimeConfig = RuntimeConfig()
