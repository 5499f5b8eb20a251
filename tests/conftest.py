"""Tiny models and data with a known answer, built here so that nothing is downloaded."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from item_tower.encoder import EncoderConfig, ItemEncoder
from item_tower.prompt import TemplateConfig
from jobs import embed_items
from jobs.cli import main
from jobs.embed_ledger import Ledger
from jobs.embed_worker import PROBE, ROW
from pipeline.catalog import read_texts

torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
WORDS = ["red", "blue", "title", "year", "kind", ":", ",", ".", "the", "a", *[str(n) for n in range(60)]]
ITEMS = 24
USERS = 60


def build_tokenizer(specials: bool) -> PreTrainedTokenizerFast:
    """Words to numbers; with specials as BERT has them: [CLS] text [SEP]."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*names, *WORDS])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A random BERT of 32 dims with its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    build_tokenizer(specials=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A random Llama of 32 dims with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    build_tokenizer(specials=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_encoder(bert_folder, llama_folder):
    """make_encoder("bert" or "llama", **EncoderConfig fields) -> an untuned ItemEncoder in float32."""

    def make(kind: str = "bert", template: TemplateConfig | None = None, **settings) -> ItemEncoder:
        folder = bert_folder if kind == "bert" else llama_folder
        pooling = "mean" if kind == "bert" else "item_token"
        values = {"model": str(folder), "pooling": pooling, "compute_dtype": "float32", "max_length": 32} | settings
        return ItemEncoder.from_config(EncoderConfig(**values), template or TemplateConfig(prompt=""))

    return make


def checkerboard(items: int = ITEMS, users: int = USERS, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Even users meet all even (red) items, odd users all odd (blue) ones, each in an order of their own.

    With seen items left out, one item of the colour remains for the test question: a recommender that has
    understood colours has Recall@1 = 1.
    """
    rng = np.random.default_rng(seed)
    catalog = pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(items)],
            "title": [f"The {'red' if n % 2 == 0 else 'blue'} {n}" for n in range(items)],
            "year": [str(n) for n in range(items)],
        }
    )
    rows = []
    for user in range(users):
        for step, item in enumerate(rng.permutation(np.arange(user % 2, items, 2))):
            rows.append((f"u{user}", f"i{item}", 1_600_000_000_000 + 1000 * (100 * user + step)))
    return catalog, pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


@dataclass
class Workspace:
    """A folder with data, a TOML and a store; ``run`` is the command line in this process."""

    folder: Path
    toml: Path
    capsys: pytest.CaptureFixture

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def run(self, command: str, *arguments: str, expect: int = 0) -> dict:
        """Run a command, check its exit status, return the JSON of its last line."""
        self.capsys.readouterr()
        status = main([*command.split(), "--config", str(self.toml), *arguments])
        output = self.capsys.readouterr()
        assert status == expect, (status, output.out[-2000:], output.err[-2000:])
        return json.loads(output.out.strip().splitlines()[-1])

    def fails(self, command: str, *arguments: str) -> dict:
        """Run a command that must fail with exit 1, one line on stderr that equals the JSON's error."""
        self.capsys.readouterr()
        status = main([*command.split(), "--config", str(self.toml), *arguments])
        output = self.capsys.readouterr()
        assert status == 1, output.err
        result = json.loads(output.out.strip().splitlines()[-1])
        assert output.err.strip().splitlines()[-1] == f"error: {result['error']}"
        return result

    def published(self) -> set[str]:
        """Every published record, and the commits of the embeddings table that are not empty (a run's seal is)."""
        found = {str(path.parent.relative_to(self.store)) for path in self.store.glob("*/[!.]*/record.json")}
        log = self.store.glob("item_embeddings/_delta_log/*.json")
        return found | {path.name for path in log if '"add"' in path.read_text()}

    def data(self, name: str) -> Path:
        return self.folder / f"{name}.csv"


TOML = """
store = "{folder}/store"
[data]
name = "board"
items = "{folder}/items.csv"
interactions = "{folder}/events.csv"
[template]
prompt = ""
fields = ["title", "year"]
[encoder]
model = "{model}"
max_length = 16
compute_dtype = "float32"
[tune]
warmup_epochs = 1
item_learning_rate = 1e-3
train = {{ epochs = 1, batch_size = 16, learning_rate = 1e-2, warmup_steps = 2, precision = "float32" }}
user_tower = {{ hidden = 16, layers = 1, heads = 1, dropout = 0.0, history = 12 }}
[user_tower]
hidden = 32
layers = 1
heads = 1
dropout = 0.0
history = 12
[train]
epochs = 8
batch_size = 16
learning_rate = 1e-2
warmup_steps = 2
patience = 8
precision = "float32"
[evaluate]
ks = [1, 5, 10]
bootstrap = 50
[variants."frozen-cache"]
"item_tower.use" = "base"
[variants."sasrec-id"]
"user_tower.features" = "id"
"user_tower.similarity" = "dot"
"""


@pytest.fixture
def workspace(tmp_path, bert_folder, capsys, monkeypatch) -> Workspace:
    """Checkerboard data and a tiny configuration; nothing is run yet."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    catalog, events = checkerboard()
    catalog.write_csv(tmp_path / "items.csv")
    events.write_csv(tmp_path / "events.csv")
    toml = tmp_path / "tiny.toml"
    toml.write_text(TOML.format(folder=tmp_path, model=bert_folder))
    return Workspace(tmp_path, toml, capsys)


class EmbedInThisProcess:
    """In place of ``RayDriver``: the worker of embed-items, called here. Adds each call's texts to ``calls``."""

    def __init__(self, calls: list[list[str]]) -> None:
        self.calls = calls

    def __call__(self, ahead: bool) -> EmbedInThisProcess:
        return self

    def __enter__(self) -> EmbedInThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, name, work, windows, workers):
        made_of, arguments = pickle.loads(work)
        worker = made_of(**arguments, ledger=Ledger())
        assert worker.encoder.dim  # loaded here, which sets the threads of a process of its own
        torch.set_num_threads(1)  # this one goes on with tiny models
        for window in windows:
            texts = read_texts(worker.catalog, worker.encoder.template, window.column(ROW).to_numpy())
            if not window.column(PROBE)[0].as_py():
                self.calls.append(texts.column("text").to_pylist())
            yield from worker(window).to_pylist()


@pytest.fixture
def embed_here(monkeypatch) -> list[list[str]]:
    """embed-items without Ray, its worker called in this process. Returns the texts of each call."""
    calls: list[list[str]] = []
    monkeypatch.setattr(embed_items, "RayDriver", EmbedInThisProcess(calls))
    return calls
