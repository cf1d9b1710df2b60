"""Settings: precedence, types, and one clear line for what is wrong."""

from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from bertpipe.config import Config, RuntimeConfig
from bertpipe.config_files import _type_of, allowed, check_keys, read_config
from bertpipe.errors import ConfigError
from bertpipe.home import PATHS
from bertpipe.setting_help import described


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_then_files_then_flags(tmp_path):
    first = write(tmp_path, "a.yaml", "optim: {lr: 1e-4, eps: 1e-7}\ntrain: {steps: 5}\n")
    second = write(tmp_path, "b.yaml", "optim: {lr: 3e-4}\n")
    cfg = read_config([first, second], [("train.steps", "7"), ("corpus.sources", "a/*.txt")])
    assert (cfg.optim.lr, cfg.optim.eps, cfg.train.steps, cfg.corpus.sources) == (3e-4, 1e-7, 7, "a/*.txt")
    assert cfg.optim.betas == Config().optim.betas
    assert isinstance(cfg.optim.lr, float)


def test_no_files_and_no_flags_are_the_defaults():
    assert read_config([], []) == Config()


def test_paths_at_home_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "runtime: {root: ~/runs}\nreport: {title: ~/ of mine, fill_mask: '~/a [MASK]'}\n"
    file = write(
        tmp_path, "a.yaml", text + "finetune: {task: {kind: regression, text: t, label: l, data: {train: ~/a b.csv}}}"
    )
    cfg = read_config([file], [("corpus.sources", "[~/texts/*.txt, ./~/x.txt, a~/b.txt]")])
    assert cfg.runtime.root == f"{tmp_path}/runs" and cfg.finetune.task.data == {"train": f"{tmp_path}/a b.csv"}
    assert cfg.corpus.sources == [f"{tmp_path}/texts/*.txt", "./~/x.txt", "a~/b.txt"]
    assert (cfg.report.title, cfg.report.fill_mask) == ("~/ of mine", "~/a [MASK]")


def test_a_resolved_config_reads_back_the_same(tmp_path):
    import yaml

    cfg = read_config([], [("finetune.seeds", "[4, 5]"), ("model.overrides", "{hidden_act: relu}")])
    path = write(tmp_path, "dump.yaml", yaml.safe_dump(cfg.model_dump(mode="json")))
    assert read_config([path], []) == cfg


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("train: {stepz: 3}", [], r"c.yaml: unknown setting 'train.stepz'; did you mean 'train.steps'\?"),
        ("trian: {steps: 3}", [], r"c.yaml: unknown section 'trian'; did you mean 'train'\?"),
        ("", [("optim.larning_rate", "1")], r"--optim.larning_rate: unknown setting"),
        ("", [("steps", "1")], r"--steps: unknown section 'steps'; did you mean 'train.steps'\?"),
        ("train: {steps: many}", [], r"train.steps"),
        ("train: {steps: 0}", [], r"train.steps: .*greater than or equal to 1.*got 0"),
        ("train: {steps: 1.5}", [], r"train.steps"),
        ("train: {steps: true}", [], r"c.yaml: train.steps is no yes/no setting, got true"),
        ("shards: {language: no}", [], r"c.yaml: shards.language is no yes/no setting, got false"),
        ("train: {steps: 3, seed: 1, steps: 4}", [], r"c.yaml:1: not valid YAML \('steps' is given twice\)"),
        ("train: {steps: 3}\noptim: {lr: 1}\ntrain: {seed: 1}", [], r"c.yaml:3: not valid YAML \('train' is given"),
        ("train:", [], r"c.yaml: section train is empty"),
        ("", [("optim.lr", "fast")], r"optim.lr"),
        ("optim: {lr: .nan}", [], r"optim.lr"),
        ("corpus: {on_error: ignore}", [], r"^corpus.on_error: must be raise or skip, got ignore$"),
        ("runtime: {compile: maybe}", [], r"^runtime.compile: must be true, false or auto, got maybe$"),
        ("runtime: {compile: null}", [], r"^runtime.compile: must be true, false or auto, got None$"),
        ("", [("runtime.compile", "2")], r"^runtime.compile: must be true, false or auto, got 2$"),
        (
            "",
            [("finetune.seeds", "[a]")],
            r"^finetune.seeds: must be a whole number or a list of whole numbers, got \['a'\]$",
        ),
        ("", [("optim.betas", "[0.9]")], r"^optim.betas: must be a list of 2 numbers, got \[0.9\]$"),
        ("", [("train", "3")], r"^--train is a section of settings; give one as --train.KEY VALUE$"),
        ("train: {phases: [1]}", [], r"^train.phases: must be a list of mappings, got 1$"),
        (
            "train: {phases: [{share: 1, sequence_length: 128, slot_tokens: x}]}",
            [],
            r"^train.phases: slot_tokens can't be x$",
        ),
        ("finetune: {dropout: x}", [], r"^finetune.dropout: must be a number or null, got x$"),
        ("finetune: {dropout: 2}", [], r"^finetune.dropout: Input should be less than 1, got 2.0$"),
        ("", [("finetune.lr", "[a]")], r"^finetune.lr: must be a number or a list of numbers, got \['a'\]$"),
        ("", [("finetune.lr", "0")], r"^finetune.lr: Input should be greater than 0, got 0$"),
        ("", [("finetune.lr", "[1e-4, -1]")], r"^finetune.lr: Input should be greater than 0, got \[0.0001, -1\]$"),
        (
            "",
            [("finetune.epochs", "[1.5]")],
            r"^finetune.epochs: must be a whole number or a list of whole numbers, got",
        ),
        ("train: 3", [], r"train is a section"),
        ("- a\n- b", [], r"expected sections"),
        ("train: {steps: 3", [], r"c.yaml:\d+: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", [], r"not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, flags, message):
    path = write(tmp_path, "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config([path], flags)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such config file"):
        read_config([tmp_path / "nowhere.yaml"], [])


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)))
def test_any_tree_is_known_keys_or_a_config_error(tree):
    try:
        check_keys(tree, "x")
    except ConfigError as error:
        assert str(error).startswith("x: ")
    else:
        assert tree is None or not tree or set(tree) <= set(Config.model_fields)


def test_every_setting_has_a_doc():
    for name, section in Config.model_fields.items():
        for key, field in section.annotation.model_fields.items():
            assert field.description, f"{name}.{key}"


def test_every_type_of_a_setting_has_words():
    """A setting of a new type would be refused with words that say nothing."""
    for name, section in Config.model_fields.items():
        for key in section.annotation.model_fields:
            assert "something else" not in allowed(name, key), f"{name}.{key}"


def test_a_section_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RuntimeConfig().root = "x"


@pytest.mark.parametrize(
    "text", ["finetune: {lr: [2e-5, 1.0e-4], epochs: 3}", "finetune:\n  lr:\n  - 2e-5\n  - 1e-4\n"]
)
def test_one_value_or_several_numbers_as_yaml_has_them_or_not(tmp_path, text):
    """YAML itself takes 2e-5, without a point, for a text."""
    cfg = read_config([write(tmp_path, "c.yaml", text)], []).finetune
    assert cfg.lr == [2e-5, 1e-4] and cfg.epochs == 3
    assert all(isinstance(rate, float) for rate in cfg.lr)
    cfg = read_config([], [("finetune.lr", "[3e-5, 1e-4]"), ("finetune.epochs", "[2, 3]")]).finetune
    assert (cfg.lr, cfg.epochs, cfg.batch_size) == ([3e-5, 1e-4], [2, 3], 32)
    assert read_config([], [("finetune.lr", "1e-4")]).finetune.lr == 1e-4


def test_types_in_words():
    assert described(Annotated[int, Ge(ge=0)] | None) == "a whole number or null, at least 0"
    assert described(Annotated[float, Gt(gt=0), Le(le=1)]) == "a number, above 0, at most 1"
    assert described(Annotated[float, Lt(lt=0.5)] | Literal["auto"]) == "a number or auto, below 0.5"
    assert described(list[Annotated[int, Field(ge=1)]] | bool) == "a list of whole numbers, true or false, at least 1"
    assert described(tuple[Annotated[float, Ge(ge=0), Lt(lt=1)], Annotated[float, Ge(ge=0), Lt(lt=1)]]) == (
        "a list of 2 numbers, at least 0, below 1"
    )
    assert described(Annotated[int, Lt(lt=2**63)]) == f"a whole number, below {2**63}"


def test_settings_that_are_paths_are_there():
    assert all(_type_of(*name.split(".")) is not None for name in PATHS)
