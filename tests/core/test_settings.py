"""Settings: where each value comes from, what is refused, and the published blocks as they stand."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
    Trainer,
    TrainerConfig,
    get_encoder_size,
)
from roma_core.settings import (
    Frozen,
    RomaSettings,
    SettingsError,
    find_env_file,
    leaves_of,
    without_credentials,
)
from tests.env_example import SETTINGS, env_example

ROOT = Path(__file__).parents[2]


class Section(Frozen):
    size: int = Field(1, description="A number.")
    name: str = Field("none", description="A name.")


class VaultSettings(RomaSettings):
    """Settings with a secret and with a section that may be absent."""

    model_config = SettingsConfigDict(env_prefix="ROMA_VAULT_")

    token: SecretStr | None = Field(None, description="A secret.")
    section: Section | None = Field(None, description="A section.")
    made: Section = Field(default_factory=lambda: Section(size=7), description="A section.")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, where a ``.env`` counts."""
    monkeypatch.delenv("ROMA_ENV_FILE")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def env_file(folder):
    """Write the ``.env`` of the working directory."""
    return lambda *lines: (folder / ".env").write_text("\n".join(lines) + "\n")


def sources(settings: RomaSettings) -> dict[str, str]:
    return {name: source for name, _, source in settings.resolved() if source != "default"}


# --- where values come from -----------------------------------------------------------------


def test_code_beats_environment_beats_file_beats_default(env_file, monkeypatch):
    env_file(*(f"ROMA_TRAINER_{name}=1" for name in ("EPOCHS", "BATCH_SIZE", "SAVE_EVERY")))
    monkeypatch.setenv("ROMA_TRAINER_EPOCHS", "2")
    monkeypatch.setenv("ROMA_TRAINER_BATCH_SIZE", "2")

    config = TrainerConfig(epochs=3)

    assert (config.epochs, config.batch_size, config.save_every, config.eval_every) == (
        3,
        2,
        1,
        500,
    )
    assert sources(config) == {
        "epochs": "code",
        "batch_size": "environment",
        "save_every": str(find_env_file()),
    }


def test_sections_merge_leaf_by_leaf(env_file, monkeypatch):
    env_file("ROMA_PRETRAIN_DECODER_CONFIG__DEPTH=3", "ROMA_PRETRAIN_DECODER_CONFIG__NHEAD=3")
    monkeypatch.setenv("ROMA_PRETRAIN_DECODER_CONFIG__NHEAD", "4")
    default = RoMAForPreTrainingConfig.from_values({})

    config = RoMAForPreTrainingConfig(decoder_config={"d_model": 96})

    assert config.decoder_config == default.decoder_config.model_copy(
        update={"depth": 3, "nhead": 4, "d_model": 96}
    )
    assert config.encoder_config == default.encoder_config
    assert set(sources(config)) == {f"decoder_config.{n}" for n in ("depth", "nhead", "d_model")}


@pytest.mark.parametrize("stack", ["encoder_config", "decoder_config"])
def test_one_nested_variable_keeps_the_other_defaults(monkeypatch, stack):
    monkeypatch.setenv(f"ROMA_PRETRAIN_{stack.upper()}__DROP_PATH_RATE", "0.25")
    default = getattr(RoMAForPreTrainingConfig.from_values({}), stack)

    expected = default.model_copy(update={"drop_path_rate": 0.25})

    assert getattr(RoMAForPreTrainingConfig(), stack) == expected
    given = {stack: {"drop_path_rate": 0.25}}
    assert getattr(RoMAForPreTrainingConfig.from_values(given), stack) == expected


def test_a_section_as_json_merges_with_its_variables(monkeypatch):
    monkeypatch.setenv("ROMA_CLASSIFIER_ENCODER_CONFIG", '{"depth": 2, "nhead": 2}')
    monkeypatch.setenv("ROMA_CLASSIFIER_ENCODER_CONFIG__NHEAD", "4")
    stack = RoMAForClassificationConfig().encoder_config
    assert (stack.depth, stack.nhead, stack.d_model) == (2, 4, 192)


def test_an_object_in_code_sets_its_whole_section(monkeypatch):
    monkeypatch.setenv("ROMA_CLASSIFIER_ENCODER_CONFIG__DEPTH", "2")
    stack = EncoderConfig(nhead=6)
    assert RoMAForClassificationConfig(encoder_config=stack).encoder_config == stack


def test_a_section_can_become_none_and_come_back(monkeypatch):
    monkeypatch.setenv("ROMA_VAULT_SECTION__SIZE", "4")
    assert VaultSettings().section == Section(size=4)
    emptied = VaultSettings(section=None)
    assert emptied.section is None and sources(emptied)["section.size"] == "code"
    monkeypatch.setenv("ROMA_VAULT_SECTION", "null")
    monkeypatch.delenv("ROMA_VAULT_SECTION__SIZE")
    assert VaultSettings().section is None
    assert VaultSettings(section={"name": "a"}).section == Section(name="a")


def test_a_made_default_keeps_its_other_leaves(monkeypatch):
    monkeypatch.setenv("ROMA_VAULT_MADE__NAME", "a")
    assert VaultSettings().made == Section(size=7, name="a")


def test_yaml_reads_no_as_false_and_it_is_no_precision(env_file):
    assert TrainerConfig(**yaml.safe_load("mixed_precision: no")).mixed_precision == "no"
    with pytest.raises(SettingsError, match="'auto', 'no', 'bf16' or 'fp16'"):
        TrainerConfig(**yaml.safe_load("mixed_precision: yes"))


def test_a_dictionary_is_one_value(env_file, monkeypatch):
    env_file("ROMA_TRAINER_OPTIMIZER_ARGS='{\"betas\": [0.9, 0.95]}'")
    assert TrainerConfig().optimizer_args == {"betas": [0.9, 0.95]}
    monkeypatch.setenv("ROMA_TRAINER_OPTIMIZER_ARGS", '{"weight_decay": 0.05}')
    config = TrainerConfig()
    assert config.optimizer_args == {"weight_decay": 0.05}
    assert sources(config) == {"optimizer_args": "environment"}


def test_lists_are_json(monkeypatch):
    monkeypatch.setenv("ROMA_PRETRAIN_TUBELET_SIZE", "[1,16,16]")
    assert RoMAForPreTrainingConfig().tubelet_size == (1, 16, 16)


def test_null_is_none_and_empty_is_not_set(env_file, monkeypatch):
    env_file("ROMA_TRAINER_GRADIENT_CLIP=null", "ROMA_TRAINER_EPOCHS=7", "ROMA_TRAINER_RUN_NAME=")
    monkeypatch.setenv("ROMA_TRAINER_MAX_CHECKPOINTS", "null")
    monkeypatch.setenv("ROMA_TRAINER_EPOCHS", "")
    config = TrainerConfig()
    assert config.gradient_clip is None and config.max_checkpoints is None
    assert config.epochs == 7 and config.run_name is None


def test_names_ignore_case(env_file, monkeypatch):
    env_file("Roma_Trainer_Batch_Size=4")
    monkeypatch.setenv("roma_trainer_epochs", "3")
    config = TrainerConfig()
    assert (config.epochs, config.batch_size) == (3, 4)


def test_the_env_file_is_found_upwards(env_file, folder, monkeypatch):
    env_file("ROMA_TRAINER_EPOCHS=3")
    (folder / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(folder / "a" / "b")
    assert TrainerConfig().epochs == 3
    (folder / "a" / ".env").write_text("ROMA_TRAINER_EPOCHS=4\n")
    assert TrainerConfig().epochs == 4
    assert find_env_file(folder) == folder / ".env"


def test_a_named_env_file_counts_from_anywhere(env_file, folder, monkeypatch, tmp_path_factory):
    env_file("ROMA_TRAINER_EPOCHS=3")
    other = tmp_path_factory.mktemp("elsewhere") / "settings.env"
    other.write_text("ROMA_TRAINER_EPOCHS=4\n")
    monkeypatch.setenv("ROMA_ENV_FILE", str(other))
    assert TrainerConfig().epochs == 4
    monkeypatch.setenv("ROMA_ENV_FILE", os.devnull)
    assert TrainerConfig().epochs == 100
    for missing in (str(other) + "x", str(folder)):
        monkeypatch.setenv("ROMA_ENV_FILE", missing)
        with pytest.raises(SettingsError, match=r"ROMA_ENV_FILE=.*there is no such file"):
            TrainerConfig()


def test_values_from_a_frozen_document_stay_as_they_are(env_file, monkeypatch):
    env_file("ROMA_TRAINER_EPOCHS=3", "ROMA_TRAINER_NONSENSE=3")
    monkeypatch.setenv("ROMA_TRAINER_BATCH_SIZE", "3")
    config = TrainerConfig.from_values({"base_lr": 0.5})
    assert (config.epochs, config.batch_size, config.base_lr) == (100, 32, 0.5)
    assert sources(config) == {"base_lr": "file"}


def test_a_dump_of_any_settings_builds_the_same_again(monkeypatch):
    monkeypatch.setenv("ROMA_PRETRAIN_TUBELET_SIZE", "[1,2,4]")
    for cls in SETTINGS:
        config = cls()
        assert cls.from_values(config.model_dump(mode="json")) == config


def test_yaml_counts_as_code(folder, monkeypatch):
    monkeypatch.setenv("ROMA_PRETRAIN_ENCODER_CONFIG__DEPTH", "2")
    monkeypatch.setenv("ROMA_PRETRAIN_MASK_RATIO", "0.5")
    (folder / "model.yaml").write_text("mask_ratio: 0.6\nencoder_config: {nhead: 4}\n")
    config = RoMAForPreTrainingConfig.from_yaml(folder / "model.yaml")
    assert config.mask_ratio == 0.6
    assert (config.encoder_config.nhead, config.encoder_config.depth) == (4, 2)
    (folder / "model.yaml").write_text("- mask_ratio\n")
    with pytest.raises(
        SettingsError, match=r"model\.yaml: expected a mapping of settings, got list"
    ):
        RoMAForPreTrainingConfig.from_yaml(folder / "model.yaml")


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, closest",
    [
        ("ROMA_TRAINER_BASE_LRR", "ROMA_TRAINER_BASE_LR"),
        ("ROMAE_TRAINER_EPOCS", "ROMA_TRAINER_EPOCHS"),
        ("ROMA_TRAINER_OPTIMIZER_ARGS__LR", "ROMA_TRAINER_OPTIMIZER_ARGS"),
    ],
)
@pytest.mark.parametrize("where", ["environment", "file"])
def test_a_misspelt_name_is_refused_with_the_closest_one(
    env_file, monkeypatch, where, name, closest
):
    if where == "file":
        env_file(f"{name}=1")
    else:
        monkeypatch.setenv(name, "1")
    place = r"\.env" if where == "file" else "the environment"
    with pytest.raises(
        SettingsError,
        match=rf"{name} in .*{place} is not a setting of .*; the closest one is {closest}$",
    ):
        TrainerConfig()


def test_variables_of_kubernetes_services_are_no_settings(monkeypatch):
    """Kubernetes adds them to every pod of a namespace that has a Service named roma-trainer."""
    for name, value in {
        "SERVICE_HOST": "10.96.0.7",
        "SERVICE_PORT": "5000",
        "SERVICE_PORT_HTTP": "5000",
        "PORT": "tcp://10.96.0.7:5000",
        "PORT_5000_TCP": "tcp://10.96.0.7:5000",
        "PORT_5000_TCP_PROTO": "tcp",
        "PORT_5000_TCP_PORT": "5000",
        "PORT_5000_TCP_ADDR": "10.96.0.7",
    }.items():
        for service in ("TRAINER", "TRAINER_OLD"):
            monkeypatch.setenv(f"ROMA_{service}_{name}", value)
    assert TrainerConfig() == TrainerConfig.from_values({})

    monkeypatch.setenv("ROMA_TRAINER_BEST_METRIC", "eval/x_service_host=b_port=tcp://c")
    assert TrainerConfig().best_metric == "eval/x_service_host=b_port=tcp://c"
    monkeypatch.setenv("ROMA_TRAINER_PORT", "5000")  # no link, but somebody's mistake
    with pytest.raises(
        SettingsError, match="ROMA_TRAINER_PORT in the environment is not a setting"
    ):
        TrainerConfig()


@pytest.mark.parametrize("where", ["environment", "file", "code", "json"])
def test_a_misspelt_nested_name_is_refused_with_the_closest_one(env_file, monkeypatch, where):
    variable, values = "ROMA_CLASSIFIER_ENCODER_CONFIG__DEPHT", {}
    if where == "file":
        env_file(f"{variable}=3")
    elif where == "environment":
        monkeypatch.setenv(variable, "3")
    elif where == "json":
        monkeypatch.setenv("ROMA_CLASSIFIER_ENCODER_CONFIG", '{"depht": 3}')
    else:
        values = {"encoder_config": {"depht": 3}}
    with pytest.raises(
        SettingsError, match=r"(?i)closest one is .*encoder_config(__|\.)depth(\.|$)"
    ):
        RoMAForClassificationConfig(**values)


@pytest.mark.parametrize("where", ["file", "environment"])
def test_a_misspelt_prefix_is_refused_too(env_file, monkeypatch, where):
    name = "ROMA_TRAINR_BASE_LR"
    if where == "file":
        env_file(f"{name}=0.5")
    else:
        monkeypatch.setenv(name, "0.5")
    with pytest.raises(SettingsError, match=f"{name} in .* do you mean ROMA_TRAINER_BASE_LR"):
        TrainerConfig()
    assert RoMAForPreTrainingConfig() is not None  # another prefix


def test_other_prefixes_and_foreign_keys_are_ignored(env_file, monkeypatch):
    env_file("WANDB_API_KEY=abc", "PATH_TO_DATA=/data", "ROMA_PRETRAIN_MASK_RATIO=0.5", "# a note")
    monkeypatch.setenv("ROMA_CLASSIFIER_NONSENSE", "1")
    assert TrainerConfig() == TrainerConfig.from_values({})
    assert RoMAForPreTrainingConfig().mask_ratio == 0.5


def test_a_wrong_value_names_its_source(env_file, monkeypatch):
    env_file("ROMA_TRAINER_EPOCHS=many")
    monkeypatch.setenv("ROMA_TRAINER_BATCH_SIZE", "0")
    with pytest.raises(SettingsError) as error:
        TrainerConfig(optimizer="adam")
    message = str(error.value)
    assert f"epochs ({find_env_file()}): " in message and "got 'many'" in message
    assert "batch_size (environment): must be greater than 0, got '0'" in message
    assert "optimizer (code): must be 'adamw' or 'sgd', got 'adam'" in message


def test_a_contradiction_is_reported_in_one_sentence(monkeypatch):
    monkeypatch.setenv("ROMA_CLASSIFIER_ENCODER_CONFIG__NHEAD", "100")
    with pytest.raises(
        SettingsError, match=r"Config: encoder_config: nhead=100 leaves heads of width 1"
    ):
        RoMAForClassificationConfig()
    with pytest.raises(SettingsError, match=r"^TrainerConfig: optimizer_args \['momentum'\]"):
        TrainerConfig(optimizer_args={"momentum": 0.9})


def test_invalid_json_is_reported(env_file):
    env_file("ROMA_PRETRAIN_TUBELET_SIZE=1,16,16")
    with pytest.raises(
        SettingsError,
        match=r"tubelet_size of RoMAForPreTrainingConfig in .*\.env: expected JSON.* got '1,16,16'",
    ):
        RoMAForPreTrainingConfig()


def test_settings_are_frozen():
    config = TrainerConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        RoMAForPreTrainingConfig().encoder_config.depth = 3


# --- published spellings --------------------------------------------------------------------


@pytest.mark.parametrize("where", ["environment", "file"])
def test_published_spellings_are_read_with_a_note(env_file, monkeypatch, where):
    pairs = {"ROMAE_PRETRAIN_N_CHANNELS": "2", "ROMAE_PRETRAIN_ENCODER_CONFIG__DEPTH": "3"}
    if where == "file":
        env_file(*(f"{name}={value}" for name, value in pairs.items()))
    else:
        for name, value in pairs.items():
            monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"ROMAE_PRETRAIN_(\w+) in .* is read as ROMA_PRETRAIN_\1"):
        config = RoMAForPreTrainingConfig()
    assert (config.n_channels, config.encoder_config.depth) == (2, 3)


def test_our_spelling_wins_with_a_warning(monkeypatch):
    monkeypatch.setenv("ROMA_TRAINER_EPOCHS", "3")
    monkeypatch.setenv("ROMAE_TRAINER_EPOCHS", "4")
    with pytest.warns(UserWarning, match="is ignored: ROMA_TRAINER_EPOCHS is set too and differs"):
        assert TrainerConfig().epochs == 3
    monkeypatch.setenv("ROMAE_TRAINER_EPOCHS", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TrainerConfig().epochs == 3


# --- what settings say of themselves --------------------------------------------------------


def test_equal_values_are_equal_settings_whatever_their_source(monkeypatch):
    monkeypatch.setenv("ROMA_PRETRAIN_MASK_RATIO", "0.5")
    configs = [
        RoMAForPreTrainingConfig(),
        RoMAForPreTrainingConfig(mask_ratio=0.5),
        RoMAForPreTrainingConfig.from_values({"mask_ratio": 0.5}),
    ]
    configs += [copy.deepcopy(configs[0]), pickle.loads(pickle.dumps(configs[0]))]
    assert all(config == configs[0] for config in configs)
    assert len(set(configs)) == 1
    assert configs[0] != RoMAForPreTrainingConfig(mask_ratio=0.6)
    assert TrainerConfig() != RoMAForPreTrainingConfig()


def test_secrets_are_masked(monkeypatch):
    monkeypatch.setenv("ROMA_VAULT_TOKEN", "hush")
    settings = VaultSettings()
    assert settings.token is not None and settings.token.get_secret_value() == "hush"
    assert ("token", "**********", "environment") in settings.resolved()
    for text in (repr(settings), str(settings.resolved()), settings.model_dump_json()):
        assert "hush" not in text


def every_settings_class() -> set[type[RomaSettings]]:
    """All subclasses with a prefix that the two packages define."""
    for package in ("roma_core", "roma_pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            if "RomaSettings" in path.read_text(encoding="utf-8"):
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    def below(cls: type) -> set[type]:
        return {c for sub in cls.__subclasses__() for c in (sub, *below(sub))}

    ours = {c for c in below(RomaSettings) if c.__module__.split(".")[0].startswith("roma_")}
    return {cls for cls in ours if cls.model_config["env_prefix"]}


def test_the_example_knows_every_settings_class():
    assert set(SETTINGS) == every_settings_class()


def test_no_prefix_is_a_prefix_of_another():
    prefixes = [cls.model_config["env_prefix"] for cls in SETTINGS] + ["ROMA_ENV_FILE"]
    assert all(prefix.startswith("ROMA_") for prefix in prefixes)
    pairs = [(a, b) for a in prefixes for b in prefixes if a is not b]
    assert not [pair for pair in pairs if pair[0].startswith(pair[1])]


def test_every_field_has_a_description():
    fields = [(cls, *leaf) for cls in SETTINGS for leaf in leaves_of(cls).items()]
    assert not [(cls.__name__, name) for cls, name, field in fields if not field.description]


def test_the_example_is_the_committed_one():
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert text == env_example(SETTINGS), "run `python -m tests.env_example > .env.example`"


def test_the_example_sets_nothing_and_all_its_values_are_the_defaults(env_file, monkeypatch):
    monkeypatch.delenv("ROMA_STORAGE_ROOT")
    lines = env_example(SETTINGS).splitlines()
    assert all(line.startswith("#") or not line for line in lines)
    assert max(map(len, lines)) <= 100
    variables = [line[2:] for line in lines if line.startswith("# ROMA_")]
    assert len(variables) == sum(len(leaves_of(cls)) for cls in SETTINGS)
    env_file(*variables)
    for cls in SETTINGS:
        assert cls() == cls.from_values({})
        assert len(sources(cls())) == len(leaves_of(cls))


def test_the_settings_of_the_core_need_neither_torch_nor_a_tracker():
    heavy = ("torch", "mlflow", "wandb", "dagster")
    script = (
        "import sys, roma_core.model.config, roma_core.trainer.config, roma_core.trainer.trackers\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- URLs with credentials -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:pass@host:5000/a@b", "https://host:5000/a@b"),
        ("https://user:p@ss@host", "https://host"),
        ("API request to http://token@h/x failed; http://h/y, too", "API request to http://h/x failed; http://h/y, too"),
        ("sqlite:////a/b@c/mlflow.db", "sqlite:////a/b@c/mlflow.db"),
        ("http://host/?mail=a@b", "http://host/?mail=a@b"),
    ],
)  # fmt: skip
def test_only_what_is_before_the_host_goes(text, left):
    assert without_credentials(text) == left


# --- blocks of the README that this project started from ---------------------------------------


def test_the_published_first_env_file(env_file):
    env_file("ROMA_TRAINER_BASE_LR=0.5", "ROMA_PRETRAIN_MASK_RATIO=0.7")
    assert TrainerConfig().base_lr == 0.5
    assert RoMAForPreTrainingConfig().mask_ratio == 0.7
    assert RoMAForPreTraining(RoMAForPreTrainingConfig()).config.mask_ratio == 0.7


def test_the_published_nested_env_file(env_file):
    env_file(
        "ROMA_CLASSIFIER_ENCODER_CONFIG__DEPTH=3",
        "ROMA_CLASSIFIER_ENCODER_CONFIG__NHEAD=8",
        "ROMA_CLASSIFIER_ENCODER_CONFIG__D_MODEL=342",
        "ROMA_CLASSIFIER_ENCODER_CONFIG__DROP_PATH_RATE=0.3",
    )
    stack = RoMAForClassificationConfig().encoder_config
    assert (stack.depth, stack.nhead, stack.d_model, stack.drop_path_rate) == (3, 8, 342, 0.3)
    assert stack.head_width == 42
    model = RoMAForClassification(RoMAForClassificationConfig(dim_output=2)).eval()
    values, positions = torch.randn(2, 4, 1, 1, 16), torch.rand(2, 3, 4)
    assert model(values, positions)[0].shape == (2, 2)


def test_the_published_sizes():
    args = get_encoder_size("RoMA-tiny")
    assert EncoderConfig(**args) == EncoderConfig(d_model=180, nhead=3, depth=12)
    with pytest.raises(
        ValueError, match="no encoder size 'RoMA-huge'; there are tiny-shallow, tiny"
    ):
        get_encoder_size("RoMA-huge")


class Items:
    """Dictionaries as docs/training.md describes them: images of 4 × 16, one token per row, padded."""

    n_tokens: ClassVar[int] = 4

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        generator = torch.Generator().manual_seed(i)
        label = i % 2
        return {
            "values": torch.randn(1, 1, self.n_tokens, 16, generator=generator) + 3 * label,
            "positions": torch.rand(3, self.n_tokens, generator=generator),
            "pad_mask": torch.arange(self.n_tokens) >= 3 + i % 2,
            "label": torch.tensor(label),
        }


def get_datasets() -> tuple[Items, Items]:
    return Items(32), Items(8)


@pytest.fixture
def small(folder, monkeypatch):
    for name, value in {
        "ROMA_TRAINER_EPOCHS": "2",
        "ROMA_TRAINER_BATCH_SIZE": "8",
        "ROMA_CLASSIFIER_ENCODER_CONFIG__DEPTH": "1",
        "ROMA_PRETRAIN_ENCODER_CONFIG__DEPTH": "1",
        "ROMA_PRETRAIN_DECODER_CONFIG__DEPTH": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def test_the_published_training_of_a_classifier(small):
    train_ds, test_ds = get_datasets()
    trainer = Trainer(TrainerConfig())
    model = RoMAForClassification(RoMAForClassificationConfig())
    trainer.train(train_dataset=train_ds, test_dataset=test_ds, model=model)

    assert model.config.dim_output == 2
    assert (small / "checkpoints" / "step-00000008" / "model.safetensors").exists()
    item = test_ds[0]
    batched = {name: tensor[None] for name, tensor in item.items()}
    logits, loss = model.eval()(**batched)
    assert logits.shape == (1, 2) and loss is not None and bool(torch.isfinite(loss))


def test_the_published_training_of_an_autoencoder(small):
    train_ds, test_ds = get_datasets()
    trainer = Trainer(TrainerConfig())
    model = RoMAForPreTraining(RoMAForPreTrainingConfig())
    trainer.train(train_dataset=train_ds, test_dataset=test_ds, model=model)

    assert (small / "checkpoints" / "step-00000008" / "model.safetensors").exists()
    batched = {name: tensor[None] for name, tensor in test_ds[0].items()}
    _, loss = model.eval()(**batched)
    assert loss is not None and bool(torch.isfinite(loss))


def test_the_class_of_a_configuration_stands_for_its_defaults(small):
    for model_class, config in (
        (RoMAForClassification, RoMAForClassificationConfig),
        (RoMAForPreTraining, RoMAForPreTrainingConfig),
    ):
        assert model_class(config).config == config()
    assert Trainer(TrainerConfig).config == Trainer().config == TrainerConfig()
