import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sage_select import SageConfig
from sage_select.system.settings import ConfigError

TABLE_4 = {
    "beta": 0.1,
    "training.epochs": 3,
    "training.batch_size": 16,
    "training.learning_rate": 5e-7,
    "training.loss": "nca",
    "data.max_length": 32_768,
    "selection.mix_start": (0.9, 0.1, 0.0),
    "selection.mix_end": (0.4, 0.4, 0.2),
    "selection.keep_start": 1.0,
    "selection.keep_end": 0.4,
    "selection.refresh_steps": 25,
    "selection.score": "sage",
}


def setting(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("name", TABLE_4)
def test_values_of_table_4(name):
    assert setting(SageConfig.paper(), name) == TABLE_4[name]
    assert setting(SageConfig(), name) == TABLE_4[name]  # the defaults are the paper's values


def test_paper_accepts_overrides():
    config = SageConfig.paper(training={"epochs": 1}, data={"path": "pairs.jsonl"})
    assert (config.training.epochs, config.training.batch_size) == (1, 16)
    assert config.data.max_length == 32_768


@given(
    st.builds(
        SageConfig,
        beta=st.floats(0.01, 10),
        seed=st.integers(0, 2**31),
        training=st.fixed_dictionaries(
            {
                "learning_rate": st.floats(1e-9, 1),
                "epochs": st.integers(1, 9),
                "loss": st.sampled_from(["nca", "dpo", "mine:loss"]),
            }
        ),
        data=st.fixed_dictionaries(
            {"path": st.text(), "columns": st.dictionaries(st.text(), st.text(), max_size=2)}
        ),
    )
)
def test_yaml_and_json_round_trip(config):
    read_back = SageConfig(**yaml.safe_load(config.to_yaml()))
    assert read_back == config
    assert read_back.hash == config.hash
    assert SageConfig(**json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("extension", ["yaml", "json"])
def test_files(extension, tmp_path):
    config = SageConfig.paper(model={"name": "m"}, beta=0.3)
    text = config.to_yaml() if extension == "yaml" else config.model_dump_json()
    (tmp_path / f"run.{extension}").write_text(text)
    assert SageConfig.read(tmp_path / f"run.{extension}", environment={}) == config


def test_variables_override_the_file_and_arguments_override_both(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {learning_rate: 1e-6, epochs: 2, batch_size: 4}\nseed: 1\n")
    config = SageConfig.read(
        path,
        environment={
            "SAGE_SELECT__TRAINING__EPOCHS": "5",
            "SAGE_SELECT__TRAINING__BATCH_SIZE": "8",
            "SAGE_SELECT__SELECTION__MIX_START": "[0.5, 0.3, 0.2]",
            "SAGE_SELECT__SEED": "7",
            "SAGE_SELECT_CACHE": "elsewhere",
        },
        overrides={"training.epochs": 6},
    )
    assert config.training.learning_rate == 1e-6
    assert (config.training.epochs, config.training.batch_size, config.seed) == (6, 8, 7)
    assert config.selection.mix_start == (0.5, 0.3, 0.2)


def test_the_hash_changes_with_settings_that_affect_the_result():
    base = SageConfig.paper(model={"name": "m"})
    deciding = [{"seed": 1}, {"training": {"learning_rate": 1e-6}}, {"selection": {"eps": 1e-5}}]
    free = [
        {"folder": "x"},
        {"training": {"checkpoint_every": 7}},
        {"model": {"device": "cpu"}},
    ]
    hashes = [SageConfig.paper(**({"model": {"name": "m"}} | change)).hash for change in deciding]
    assert len({base.hash, *hashes}) == 4
    for change in free:
        change = {**change, "model": {"name": "m", **change.get("model", {})}}
        assert SageConfig.paper(**change).hash == base.hash
    assert str(base.run_folder).endswith(base.hash)
    assert str(SageConfig(folder="here").run_folder) == "here"


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        SageConfig().training.epochs = 4


def test_the_schema_describes_every_setting():
    schema = SageConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            if "$ref" not in field:
                assert field["description"], name


ERRORS = {
    "there is no setting 'trainin'; did you mean 'training'?": {"trainin": {}},
    "training: there is no setting 'lr'; there are loss, learning_rate": {"training": {"lr": 1}},
    "training.learning_rate: should be greater than 0, got 0": {"training": {"learning_rate": 0}},
    "training.epochs: should be greater than or equal to 1, got 0": {"training": {"epochs": 0}},
    "training.epochs: should be a whole number, got 'many'": {"training": {"epochs": "many"}},
    "model.revision: should be a valid string, got 1234; put quotes": {"model": {"revision": 1234}},
    "there is no setting 'bbb": {"b" * 10_000: 1},
    "training.loss: there is no function 'ncaa'; did you mean 'nca'?": {
        "training": {"loss": "ncaa"}
    },
    "micro_batch_size 32 is larger than batch_size 16": {"training": {"micro_batch_size": 32}},
    "training.mixed_precision: should be 'none' or 'bfloat16', got 'float16'": {
        "training": {"mixed_precision": "float16"}
    },
    "training.warmup_share: should be less than or equal to 1, got 10": {
        "training": {"warmup_share": 10}
    },
    "beta: should be greater than 0, got -0.1": {"beta": -0.1},
    "beta: should be a finite number": {"beta": float("inf")},
    "selection.score: there is no function 'sgae'; did you mean 'sage'?": {
        "selection": {"score": "sgae"}
    },
    "selection.keep_end: should be less than or equal to 1, got 40": {
        "selection": {"keep_end": 40}
    },
    "selection.mix_start: shares must sum to 1, but these sum to 0.9": {
        "selection": {"mix_start": [0.5, 0.4, 0.0]}
    },
    "mix_start has 2 shares and mix_end 3": {"selection": {"mix_start": [0.5, 0.5]}},
    "selection.refresh_steps: should be greater": {"selection": {"refresh_steps": 0}},
    "selection.length_norm: should be 'total', 'sqrt', 'none' or 'stratified'": {
        "selection": {"length_norm": "mean"}
    },
    "selection.mix_start has 3 shares, but strata.by: none needs 1": {"strata": {"by": "none"}},
    "strata.shares: shares must sum to 1": {"strata": {"shares": [0.5, 0.4]}},
    "data.max_length: should be greater than or equal to 2, got 1": {"data": {"max_length": 1}},
    "data.held_out: should be less than 1, got 1.0": {"data": {"held_out": 1.0}},
    "data: should be a mapping of settings, got 'pairs.jsonl'": {"data": "pairs.jsonl"},
    "reference: file replaces model and store": {"reference": {"file": "a", "model": "b"}},
    "model.dtype: should be 'auto', 'float32', 'bfloat16' or 'float16', got 'fp8'": {
        "model": {"dtype": "fp8"}
    },
}


@pytest.mark.parametrize("message", ERRORS)
def test_messages(message):
    with pytest.raises(ConfigError) as error:
        SageConfig(**ERRORS[message])
    assert message in str(error.value)


def test_all_wrong_settings_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        SageConfig(beta=0, training={"epochs": 0}, data={"max_length": 0})
    assert len(str(error.value).splitlines()) == 3


FILES = {
    "run.yaml: a configuration must be a mapping": "- beta",
    "run.yaml: cannot be read": "beta: [",
    "'beta' is set twice": "beta: 0.1\nbeta: 0.2",
    "'epochs' is set twice": "training:\n  epochs: 1\n  epochs: 2",
    "'seed' is set twice; keep one of them": '{"seed": 1, "seed": 2}',
    "run.yaml: cannot be read: 'utf-8' codec": b"\xff",
    "run.yaml: beta: should be greater than 0, got 0": "beta: 0",
    "a configuration must be a mapping of settings": "",
    "has more than 100,000 characters, which is no configuration": "# " + "x" * 100_000,
    "with aliases expanded": "a0: &a0 [1]\n"
    + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(20)),
    "expanded": "".join(
        f"a{i + 1}: &a{i + 1} {{{', '.join(f'k{j}: *a{i}' for j in range(9))}}}\n" for i in range(9)
    ).replace("*a0", "1"),
    "it nests more than 20 levels; sections contain settings": "beta: &a [*a]",
    "it nests more than 20 levels": "beta: " + "[" * 40_000,
    "it nests more than": "{a: " * 20_000,
    "more than 20 levels; sections": '{"seed": ' + "[" * 40_000,
    "line 1: the name of a setting must be a text, got a sequence": "? [1, 2]\n: 3",
    "the name of a setting must be a text, got a mapping": "training:\n  ? {a: b}\n  : 3",
    "the name of a setting must be a text, got '5'": "5: 6",
    "could not determine a constructor for the tag": "beta: !!python/object/apply:os.getcwd []",
    "could not determine a constructor for the tag 'tag:yaml.org,2002:binary'": "beta: !!binary aA",
    "run.yaml: cannot be read: string index out of range": "beta: !!int ''",
    "seed: should be less than or equal to 9223372036854775807": "seed: 9223372036854775808",
    "run.yaml: cannot be read: Exceeds the limit": "seed: " + "9" * 5000,
    "training.epochs: should be a whole number, got '010'": "training: {epochs: 010}",
    "training.epochs: should be a whole number, got '1:30'": "training: {epochs: 1:30}",
    "training.epochs: should be a whole number, got True": "training: {epochs: yes}",
    "training.epochs: should be a whole number, got 2.0": "training: {epochs: 2.0}",
    "training.learning_rate: should be a number, got '1e-6'": "training: {learning_rate: '1e-6'}",
    "training.learning_rate: should be a finite number, got nan": "training: {learning_rate: .nan}",
    "beta: should be a finite number, got inf": "beta: 1e999",
    "model.name: should be a valid string, got False; put quotes around it": "model: {name: no}",
    "special characters are not allowed": "beta: \0",
    "run.yaml: cannot be read: 'utf-8' codec can't decode byte": "beta: 1".encode("utf-16"),
}


def test_values_of_yaml_are_what_they_look_like(tmp_path):
    text = (
        "\ufefftraining: {learning_rate: 5e-7, weight_decay: 1E-2, epochs: 1_0, warmup_share: .5}\n"
        "model: {name: 12e4567, revision: 2024-01-01, tokenizer: 0123}\nseed: -0x10\n"
    ).replace("-0x10", "0x10")
    (tmp_path / "run.yaml").write_text(text)
    config = SageConfig.read(tmp_path / "run.yaml", environment={})
    assert (config.training.learning_rate, config.training.weight_decay) == (5e-7, 1e-2)
    assert (config.training.epochs, config.training.warmup_share, config.seed) == (10, 0.5, 16)
    model = config.model
    assert (model.name, model.revision, model.tokenizer) == ("12e4567", "2024-01-01", "0123")


@given(st.sampled_from(["1e5", "5e-7", "0123", "0x1F", "1_0", "1:30", "no", "~", "", "null", ".nan",
                        "2024-01-01", "a: b", "- x", "=", "<<", "*a", "&a", "%x", "\ufeff", "\x85"])
       | st.text(max_size=5))  # fmt: skip
def test_every_text_survives_a_file(tmp_path_factory, text):
    config = SageConfig(model={"name": text}, data={"columns": {text: text}})
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert SageConfig.read(file, environment={}) == config


JSON_FILES = {
    "NaN is no number of JSON": '{"beta": NaN}',
    "'seed' is set twice": '{"seed": 1, "seed": 1}',
    "it nests more than 20 levels": "[" * 40_000,
    "it nests more than": '{"a":' * 40 + "1" + "}" * 40,
    "beta: should be a finite number, got inf": '{"beta": 1e999}',
    "run.json: cannot be read: Exceeds the limit": '{"seed": ' + "9" * 5000 + "}",
    "must be a mapping": "[]",
}


@pytest.mark.parametrize("message", JSON_FILES)
def test_messages_about_json_files(message, tmp_path):
    (tmp_path / "run.json").write_text(JSON_FILES[message])
    with pytest.raises(ConfigError) as error:
        SageConfig.read(tmp_path / "run.json", environment={})
    assert message in str(error.value)


@pytest.mark.parametrize("message", FILES)
def test_messages_about_files(message, tmp_path):
    content = FILES[message]
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        SageConfig.read(tmp_path / "run.yaml", environment={})
    assert message in str(error.value)


ENVIRONMENTS = {
    "there is no setting 'lr'": {"SAGE_SELECT__TRAINING__LR": "1"},
    "training.epochs: should be a whole number": {"SAGE_SELECT__TRAINING__EPOCHS": "x"},
    "SAGE_SELECT__TRAINING__EPOCH: training: there is no setting 'epoch'; did you mean 'epochs'?": {
        "SAGE_SELECT__TRAINING__EPOCH": "1"
    },
    "the setting seed is set twice": {"SAGE_SELECT__SEED": "1", "SAGE_SELECT__seed": "2"},
    "SAGE_SELECT__BETA: cannot be read": {"SAGE_SELECT__BETA": "["},
    "SAGE_SELECT__BETA: beta: should be greater than 0": {"SAGE_SELECT__BETA": "0"},
    "with aliases": {"SAGE_SELECT__DATA__COLUMNS": "[&a [1, 1], &b [" + "*a, " * 9999 + "]]"},
}
MISSPELT = {
    "SAGE_SELECT__TRAINING__EPOCHS": [
        "SAGE_SELECT_TRAINING_EPOCHS", "SAGE_SELECT_TRAINING__EPOCHS",
        "SAGE_SELECT__TRAINING_EPOCHS", "SAGESELECT__TRAINING__EPOCHS",
        "SAGE_SELECT___TRAINING__EPOCHS", "sage_select__training__epochs",
        "SAGE__SELECT__TRAINING__EPOCHS", "_SAGE_SELECT__TRAINING__EPOCHS",
        "SAGE_SELCT__TRAINING__EPOCHS", "SAGE_SELECT_TRAINING_EPOCH",
    ],
    "SAGE_SELECT__TRAINING__LEARNING_RATE": [
        "SAGE_SELECT__TRAINING_LEARNING_RATE", "SAGE_SELECT_TRAINING__LEARNING_RATE",
        "SAGE_SELECT__LEARNING_RATE",
    ],
    "SAGE_SELECT__SEED": ["SAGE_SELECT_SEED", "Sage_Select__Seed"],
    "SAGE_SELECT_CACHE": ["SAGE_SELECT__CACHE", "SAGE_SELECT_CACH", "SAGESELECT_CACHE"],
    "SAGE_SELECT_PATIENCE": ["sage_select_patience", "SAGE_SELECT_PATIENTE"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong"), [(r, w) for r, names in MISSPELT.items() for w in names]
)
def test_a_misspelt_variable_is_refused_with_the_right_one(right, wrong, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=rf"^{wrong}: there is no such .* did you mean {right}\?"):
        SageConfig.read(tmp_path / "run.yaml", environment={wrong: "1"})


def test_an_unknown_variable_that_looks_like_ours_is_a_warning(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1")
    others = dict.fromkeys(("SAGEMAKER_DIR", "SAGE_ROOT", "SAGE_SELECT_DATA", "MY_SEED"), "1")
    with pytest.warns(UserWarning, match="SAGE_SELECT_LAUNCHER: there is no such") as warned:
        SageConfig.read(
            tmp_path / "run.yaml", environment={**others, "SAGE_SELECT_LAUNCHER": "slurm"}
        )
    assert len(warned) == 1


@pytest.mark.parametrize("message", ENVIRONMENTS)
def test_messages_about_environment_variables(message, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError) as error:
        SageConfig.read(tmp_path / "run.yaml", environment=ENVIRONMENTS[message])
    assert message in str(error.value)


def test_a_json_file_is_parsed_as_json(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": }')
    with pytest.raises(ConfigError, match="cannot be read: Expecting value"):
        SageConfig.read(tmp_path / "run.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        SageConfig.read(tmp_path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="`sage-select config paper` prints one"):
        SageConfig.read(tmp_path / "none.yaml")
