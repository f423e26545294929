"""Models leave as folders that need nothing of us, and published ones come in whole or not at all."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

from mosaicbert_ds.errors import CheckpointError, DataError, UserError
from mosaicbert_ds.model import (
    ModelConfig,
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
    build_pretraining_model,
    export_model,
    import_published,
)
from mosaicbert_ds.model.build import to_hf_config
from mosaicbert_ds.model.export import read_tokenizer, write_folder
from mosaicbert_ds.model.mosaicbert import MosaicBertModel

TINY = ModelConfig(
    num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=64
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

BARE_ENVIRONMENT = """
import sys

class Absent:  # an environment without these packages
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mosaicbert_ds", "deepspeed", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline
)

folder, logits_file = sys.argv[1:]
known = {"trust_remote_code": True}
assert AutoConfig.from_pretrained(folder, **known).vocab_size == 64
tokenizer = AutoTokenizer.from_pretrained(folder, **known)
batch = tokenizer(["a b [MASK] d", "c"], padding=True, return_tensors="pt")
model = AutoModelForMaskedLM.from_pretrained(folder, **known)
torch.save(model(**batch).logits.detach(), logits_file)
assert AutoModel.from_pretrained(folder, **known)(**batch).last_hidden_state.shape == (2, 6, 32)
classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **known)
assert classifier(**batch).logits.shape == (2, 3)
tagger = AutoModelForTokenClassification.from_pretrained(folder, num_labels=5, **known)
assert tagger(**batch).logits.shape == (2, 6, 5)
tagged = pipeline("token-classification", model=tagger, tokenizer=tokenizer)("a b c d")
assert [token["word"] for token in tagged] == ["a", "b", "c", "d"]
reader = AutoModelForQuestionAnswering.from_pretrained(folder, **known)
assert reader(**batch).start_logits.shape == (2, 6)
best = pipeline("fill-mask", model=folder, **known)("a b [MASK] d")[0]
assert best["token"] == model(**tokenizer("a b [MASK] d", return_tensors="pt")).logits[0, 3].argmax()
"""


@pytest.fixture
def tokenizer_dir(tmp_path):
    """What the `tokenizers` library itself writes: a tokenizer.json and nothing else."""
    letters = [chr(ord("a") + i) for i in range(26)]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters, *("##" + x for x in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(config=TINY):
    torch.manual_seed(0)
    model = build_pretraining_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


NARROW_PRE_RMS = {"norm_placement": "pre", "norm": "rmsnorm", "num_hidden_layers": 3, "masked_only_layers": 2}


@pytest.mark.parametrize(
    "values", [{"architecture": "mosaicbert"}, {"architecture": "bert"}, NARROW_PRE_RMS], ids=str
)
def test_an_exported_folder_works_where_this_package_is_absent(values, tokenizer_dir, tmp_path, capfd):
    config = replace(TINY, **values)
    model = trained(config)
    out = tmp_path / "runs" / "exported"
    export_model(weights_of(model), config, tokenizer_dir, out)
    assert [path.name for path in out.parent.iterdir()] == ["exported"], "no scratch folder is left"
    read_tokenizer(out)
    assert "custom code" not in "".join(capfd.readouterr()), "nobody is asked"

    run = subprocess.run(
        [sys.executable, "-I", "-c", BARE_ENVIRONMENT, str(out), str(tmp_path / "logits.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    batch = tokenizer(["a b [MASK] d", "c"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 4, 8, 3], [2, 7, 3, 0, 0, 0]]
    real = batch["attention_mask"].bool()
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found[real], model(**batch).logits[real])


@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
def test_a_second_text_is_read_as_pretraining_taught_and_marked(architecture, tokenizer_dir, tmp_path):
    """Pretraining gives every token type 0: to it, a second text of a random row alone would be noise."""
    config = replace(TINY, architecture=architecture)
    weights, out = weights_of(trained(config)), tmp_path / "out"
    export_model(weights, config, tokenizer_dir, out)
    exported = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)
    taught, drawn = weights["bert.embeddings.token_type_embeddings.weight"]
    found = exported.get_parameter("bert.embeddings.token_type_embeddings.weight")
    torch.testing.assert_close(found, torch.stack([taught, taught + drawn]), rtol=0, atol=0)
    pair = AutoTokenizer.from_pretrained(out, trust_remote_code=True)("a b", "c d", return_tensors="pt")
    assert pair["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_the_exported_modelling_file_imports_nothing_but_torch_and_transformers(tokenizer_dir, tmp_path):
    export_model(weights_of(trained()), TINY, tokenizer_dir, tmp_path / "out")
    source = (tmp_path / "out" / "modeling_mosaicbert.py").read_text()
    imported = {
        line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_a_bert_export_is_a_plain_hugging_face_folder(tokenizer_dir, tmp_path):
    config = replace(TINY, architecture="bert")
    export_model(weights_of(trained(config)), config, tokenizer_dir, tmp_path / "out")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model) is BertForMaskedLM
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == config.max_position_embeddings, "what is longer is cut, not an error"
    weights, facts = (tmp_path / "out" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == facts.stat().st_mode, "whoever may read one may read the other"
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", "which transformers 4 knows as well"


def test_embeddings_and_decoder_are_found_by_the_calls_that_transformers_4_ties_them_with():
    model = MosaicBertForMaskedLM(to_hf_config(TINY))
    assert model.get_output_embeddings() is model.cls.predictions.decoder
    assert model.get_input_embeddings() is model.bert.embeddings.word_embeddings
    assert "get_input_embeddings" in vars(MosaicBertModel), "transformers 5 would find them without"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_export_refuses_to_overwrite(tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export_model(weights_of(trained()), TINY, tokenizer_dir, out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_export_writes_nothing_when_the_folder_gives_other_logits(tokenizer_dir, tmp_path, monkeypatch):
    from mosaicbert_ds.model import export

    wrong = export.modeling_source().replace("F.gelu(gate)", "F.relu(gate)")
    monkeypatch.setattr(export, "modeling_source", lambda: wrong)
    with pytest.raises(CheckpointError, match="logits differ"):
        export_model(weights_of(trained()), TINY, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_tokenizer_that_does_not_fit(tokenizer_dir, tmp_path):
    weights = weights_of(trained())
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        export_model(weights, TINY, tmp_path, tmp_path / "out")
    path = tokenizer_dir / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace("[MASK]", "[HOLE]"))
    with pytest.raises(DataError, match=r"lacks the special tokens \[MASK\]"):
        export_model(weights, TINY, tokenizer_dir, tmp_path / "out")
    larger = json.loads(text)
    larger["model"]["vocab"].update({f"word{i}": 57 + i for i in range(20)})
    path.write_text(json.dumps(larger))
    with pytest.raises(DataError, match="has 77 tokens, the model only 64"):
        export_model(weights, TINY, tokenizer_dir, tmp_path / "out")


@pytest.fixture
def published(tmp_path):
    """A folder as the published code leaves it: model_type bert, the decoder's weight stored twice."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({k: v.clone() for k, v in trained().state_dict().items()}, folder / "model.safetensors")
    facts = to_hf_config(TINY).to_dict() | {"model_type": "bert", "alibi_starting_size": 512}
    facts |= {"auto_map": {"AutoConfig": "configuration_bert.BertConfig"}}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def change(folder, **weights):
    """Store other weights; None leaves one out."""
    path = folder / "model.safetensors"
    merged = load_file(path) | weights
    save_file({name: weight for name, weight in merged.items() if weight is not None}, path)


def test_import_lists_what_is_missing_unexpected_and_of_wrong_shape(published, tmp_path):
    change(
        published,
        **{
            "bert.encoder.layer.1.mlp.wo.bias": None,
            "bert.encoder.layer.0.attention.self.query.weight": torch.zeros(32, 32),
            "cls.predictions.decoder.bias": torch.zeros(63),
        },
    )
    with pytest.raises(CheckpointError) as error:
        import_published(published, tmp_path / "out")
    assert "missing bert.encoder.layer.1.mlp.wo.bias" in str(error.value)
    assert "unexpected bert.encoder.layer.0.attention.self.query.weight" in str(error.value)
    assert "cls.predictions.decoder.bias has shape (63,), not (64,)" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_import_reads_a_pickle_only_when_told_to_and_runs_no_code_from_it(published, tmp_path):
    weights = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    torch.save({f"model.{name}": weight for name, weight in weights.items()}, published / "pytorch_model.bin")
    with pytest.raises(UserError, match="--trust-pickle"):
        import_published(published, tmp_path / "out")
    import_published(published, tmp_path / "out", trust_pickle=True)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(dict(model.state_dict()), weights)

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (published / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Trap()}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        import_published(published, tmp_path / "again", trust_pickle=True)
    assert not (tmp_path / "sprung").exists()


def test_import_keeps_a_classifier_and_the_tokenizer(published, tokenizer_dir, tmp_path):
    torch.manual_seed(0)
    config = to_hf_config(TINY)
    config.id2label = {0: "yes", 1: "no", 2: "perhaps"}
    model = MosaicBertForSequenceClassification(config).eval()
    save_file(model.state_dict(), published / "model.safetensors")
    (published / "config.json").write_text(json.dumps(config.to_dict() | {"model_type": "bert"}))
    AutoTokenizer.from_pretrained(tokenizer_dir, tokenizer_type="bert").save_pretrained(published)
    import_published(published, tmp_path / "out")

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}
    batch = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)(
        "a b", return_tensors="pt"
    )
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3]]
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_import_says_when_there_is_no_tokenizer_and_takes_one_from_elsewhere(
    published, tokenizer_dir, tmp_path, caplog
):
    import_published(published, tmp_path / "out")
    assert "holds no tokenizer" in caplog.text and "give --tokenizer DIR" in caplog.text
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    import_published(published, tmp_path / "whole", tokenizer_dir=tokenizer_dir)
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match=r"org/name is no folder; .* hf download org/name"):
        import_published(Path("org/name"), tmp_path / "other")


def test_import_names_what_a_folder_lacks(published, tmp_path):
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"norm_placement": "sandwich"}))
    with pytest.raises(CheckpointError, match=r"config\.json: norm_placement is 'sandwich'; allowed are"):
        import_published(published, tmp_path / "out")
    del config["hidden_size"]
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks hidden_size"):
        import_published(published, tmp_path / "out")
    (published / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        import_published(published, tmp_path / "out")
    (published / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="is damaged"):
        import_published(published, tmp_path / "out")
    (published / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        import_published(published, tmp_path / "out")


def test_a_crash_while_writing_leaves_no_folder_behind(tokenizer_dir, tmp_path, monkeypatch):
    def crash(self, target):
        raise OSError("power is gone")

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(OSError, match="power is gone"):
        write_folder(trained(), tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
