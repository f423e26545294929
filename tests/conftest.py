"""What all tests share: one thread, a private folder for DeepSpeed's build, a small prepared corpus."""

import os
import socket
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SAMPLES = REPO / "mosaicbert_ds" / "samples"

# Before torch and DeepSpeed are imported. A private build folder: the default one is shared with every
# other environment of the machine, and a lock that a killed process leaves there stops all of them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPO / ".torch_extensions"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# Without a GPU kernels run in Triton's interpreter, which must be asked for before the first import of
# triton, by whichever test that is (deepspeed imports it too).
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the first 40 sample documents: vocabulary 512, chunks of 32 tokens."""
    from mosaicbert_ds.data.config import DataConfig
    from mosaicbert_ds.data.prepare import prepare
    from mosaicbert_ds.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    lines = (SAMPLES / "pretrain" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    train_tokenizer([str(folder / "text.jsonl")], folder / "tokenizer", 512)
    prepare(
        [folder / "text.jsonl"],
        folder / "shards",
        folder / "tokenizer",
        DataConfig(max_length=32, documents="chunk"),
        workers=1,
        held_out_fraction=0.3,
    )
    return folder / "shards"


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
