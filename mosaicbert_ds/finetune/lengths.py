"""Does a model trained on short text read long text? Masked-LM loss by length and by position.

All lengths are taken on the same tokens: documents that are long enough for the longest length are cut to
whole numbers of it, some tokens are hidden, and then it is cut into pieces of each length. The same tokens
are guessed, but for those at the ends of pieces, and a loss differs by the context alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mosaicbert_ds.data.config import EVALUATION_MASK_RATE
from mosaicbert_ds.data.files import write_durably
from mosaicbert_ds.data.loader import EVALUATION_SEED
from mosaicbert_ds.data.masking import mask_tokens, sample_keys
from mosaicbert_ds.data.sources import BadInput, find_pieces, read_piece
from mosaicbert_ds.data.tokenizer import LoadedTokenizer
from mosaicbert_ds.errors import ConfigError, DataError
from mosaicbert_ds.finetune.models import check_fits, find_pretrained, load_masked_lm
from mosaicbert_ds.finetune.report import make_out

_BINS = 16  # positions are averaged in so many equal parts of a length
_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class LengthLoss:
    """One length. Losses in nats a masked token; `by_position` from the piece's start to its end."""

    length: int
    pieces: int
    masked: int
    loss: float
    std_error: float  # of the mean, over pieces
    by_position: list[float | None]  # None where nothing was masked: the ends never are


def evaluate_lengths(
    model: Path, sources: Sequence[str], lengths: Sequence[int], out: Path, text_field: str, max_tokens: int
) -> list[LengthLoss]:
    """Take the losses, write `lengths.json`, `lengths.md` and `lengths.png` to `out`, and return them.

    max_tokens: of the text, at most. Raises ConfigError for a length that the model or the arithmetic does
    not allow, DataError where no document is long enough.
    """
    make_out(out)
    lengths = sorted(set(lengths))
    pretrained = find_pretrained(model, out / "models")
    limit = pretrained.longest()
    longest = lengths[-1]
    for length in lengths:
        if length < _BINS or longest % length:
            raise ConfigError(
                f"length {length} is not allowed: each must be {_BINS} or more and divide the longest, "
                f"{longest}"
            )
        if limit is not None and length > limit:
            raise ConfigError(f"length {length} is over the {limit} positions of {model}; leave it out")
    tokenizer = pretrained.tokenizer(out / "models")
    check_fits(pretrained, tokenizer, longest)
    stream = _long_text(sources, tokenizer, longest, text_field, max_tokens)
    pretrained.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_masked_lm(pretrained.folder).to(device)  # type: ignore[arg-type]
    if device.type == "cuda":
        network.bfloat16()
    flat, keys = stream.reshape(-1), sample_keys(EVALUATION_SEED, 0, np.arange(len(stream)))
    places, labels = mask_tokens(flat, np.full(len(stream), longest), keys, EVALUATION_MASK_RATE, tokenizer)
    losses = [_loss_at(network, tokenizer, flat, places, labels, length, device) for length in lengths]
    write_durably(out / "lengths.json", json.dumps([vars(loss) for loss in losses], indent=1).encode())
    write_durably(out / "lengths.md", table(losses).encode())
    _plot(losses, out / "lengths.png")
    return losses


def _long_text(
    sources: Sequence[str], tokenizer: LoadedTokenizer, longest: int, text_field: str, max_tokens: int
) -> np.ndarray:
    """(pieces, longest) int64: ordinary tokens of the documents that are long enough."""
    pieces: list[np.ndarray] = []
    items = (item for piece in find_pieces(sources).pieces for item in read_piece(piece, text_field))
    for document in items:
        if isinstance(document, BadInput):
            raise DataError(f"{document.message}; mend it")
        ids = np.array(tokenizer.encode([document.text])[0], np.int64)
        whole = len(ids) // longest * longest
        pieces += [*ids[:whole].reshape(-1, longest)]
        if len(pieces) * longest >= max_tokens:  # also within a document: a book may be one
            del pieces[max(1, max_tokens // longest) :]
            break
    if not pieces:
        raise DataError(
            f"no document of {', '.join(sources)} has {longest} tokens; give longer text or smaller lengths"
        )
    return np.stack(pieces)


@torch.no_grad()
def _loss_at(
    network: Any,
    tokenizer: LoadedTokenizer,
    flat: np.ndarray,
    places: np.ndarray,
    labels: np.ndarray,
    length: int,
    device: torch.device,
) -> LengthLoss:
    """flat: (tokens,) with those at `places` (masked,) hidden; labels: (masked,) what stood there."""
    pieces = flat.reshape(-1, length).copy()
    # [CLS] and [SEP] take the place of each piece's ends.
    pieces[:, 0], pieces[:, -1] = tokenizer.cls_id, tokenizer.sep_id
    inside = (places % length != 0) & (places % length != length - 1)
    places, labels = places[inside], labels[inside]
    if not len(places):
        raise DataError("the text is too short: no token of it was masked")
    losses = np.empty(len(places), np.float64)
    size = max(1, _BATCH_TOKENS // length)
    for start in range(0, len(pieces), size):
        low, high = np.searchsorted(places, [start * length, (start + size) * length])
        ids = torch.from_numpy(pieces[start : start + size]).to(device)  # (batch, length), some masked
        hidden = network.bert(input_ids=ids).last_hidden_state.flatten(0, 1)
        logits = network.cls(hidden[torch.from_numpy(places[low:high] - start * length).to(device)])
        targets = torch.from_numpy(labels[low:high]).to(device)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        losses[low:high] = loss.cpu().numpy()
    sums, counts = (np.bincount(places // length, weights, len(pieces)) for weights in (losses, None))
    of_piece = sums[counts > 0] / counts[counts > 0]
    part = (places % length) * _BINS // length
    by_position, masked = np.bincount(part, losses, _BINS), np.bincount(part, minlength=_BINS)
    return LengthLoss(
        length=length,
        pieces=len(pieces),
        masked=len(places),
        loss=float(losses.mean()),
        std_error=float(of_piece.std() / np.sqrt(len(of_piece))),
        by_position=[
            round(loss / n, 4) if n else None
            for loss, n in zip(by_position.tolist(), masked.tolist(), strict=True)
        ],
    )


def table(losses: Sequence[LengthLoss]) -> str:
    """The losses as a Markdown table."""
    lines = [
        "| length | pieces | masked tokens | loss | +- | first sixteenth | last sixteenth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in losses:
        counts = f"{row.length} | {row.pieces:,} | {row.masked:,}"
        ends = ["" if end is None else f"{end:.3f}" for end in (row.by_position[0], row.by_position[-1])]
        lines.append(f"| {counts} | {row.loss:.3f} | {row.std_error:.3f} | {ends[0]} | {ends[1]} |")
    return "\n".join(lines) + "\n"


def _plot(losses: Sequence[LengthLoss], picture: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib; pip install 'mosaicbert-ds[report]'") from None

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_length, by_position = figure.subplots(1, 2)
    xs, ys = [row.length for row in losses], [row.loss for row in losses]
    by_length.errorbar(xs, ys, [row.std_error for row in losses], fmt="o-", capsize=3)
    by_length.set(xscale="log", xlabel="length, tokens", ylabel="loss, nats a masked token (15 %)")
    by_length.set_xticks(xs, [str(x) for x in xs])
    by_length.minorticks_off()
    for row in losses:
        middles = (np.arange(_BINS) + 0.5) * row.length / _BINS
        by_position.plot(middles, row.by_position, ".-", label=f"length {row.length}")
    by_position.set(xscale="log", xlabel="position in the text", ylabel="loss, nats a masked token")
    by_position.legend(frameon=False, fontsize=8)
    for panel in (by_length, by_position):
        panel.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)
