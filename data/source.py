"""What an encoder-decoder's encoder reads of a batch, and what is left to its decoder: no target is in both.

B batch, S sequence, R positions of the source
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from data.batches import Batch, Source
from data.tokenizer import BEGIN, END


class Positions(NamedTuple):
    """How many places of a window each side has."""

    decoder: int  # S
    encoder: int  # R


def length_of_source(given: int | None, sequence_length: int, of_dialogues: bool) -> int | None:
    """What divided takes as source_length: of plain text what is given, or else half of a window; None of dialogues."""
    return None if of_dialogues else given or sequence_length // 2


def positions(sequence_length: int, source_length: int | None, encoder_layers: int) -> Positions:
    """What divided makes of a window; without an encoder the decoder has it all."""
    if encoder_layers == 0:
        return Positions(sequence_length, 0)
    if source_length is None:
        return Positions(sequence_length, sequence_length)
    return Positions(sequence_length - source_length, source_length)


def divided(batch: Batch, source_length: int | None) -> Batch:
    """The decoder's batch, the encoder's Source in it. Shapes depend on those of the batch alone.

    source_length R: of plain text the encoder reads the first R tokens of each window, the decoder the other S - R.
    None: of dialogues the encoder reads each document's tokens before its first counted target, the context, and the
    decoder the response; both keep their places in the window (R = S), and all other places are padding.
    """
    return _contexts_apart(batch) if source_length is None else _windows_apart(batch, source_length)


def _windows_apart(batch: Batch, source_length: int) -> Batch:
    head = batch.apply(lambda t: t[:, :source_length].contiguous() if t.dim() > 1 else t)
    rest = batch.apply(lambda t: t[:, source_length:].contiguous() if t.dim() > 1 else t)
    following = pad(head.tokens.next[:, :-1], (0, 1), value=END)
    source = Source(head.tokens._replace(next=following), head.document)
    return rest._replace(tokens=rest.tokens._replace(position=rest.tokens.position - source_length), source=source)


def _contexts_apart(batch: Batch) -> Batch:
    """The response's first input, the context's last token, becomes the begin id; the encoder keeps that token.

    A document's first token is no target that counts: its decoder has not begun.
    """
    tokens, document = batch.tokens, batch.document
    counted = batch.counted & (tokens.id != END)
    begun = _has_begun(counted, document)
    first = begun & ~(_before(begun) & _same_document_before(document))
    of_source, of_decoder = tokens.real & (first | ~begun), tokens.real & begun
    read = tokens._replace(
        id=torch.where(of_source, tokens.id, END),
        previous=torch.where(of_source, tokens.previous, BEGIN),
        next=torch.where(of_source & pad(of_source[:, 1:], (0, 1)), tokens.next, END),
        real=of_source,
    )
    written = tokens._replace(
        id=torch.where(first, BEGIN, torch.where(of_decoder, tokens.id, END)),
        previous=torch.where(first | _before(first) | ~of_decoder, BEGIN, tokens.previous),
        real=of_decoder,
    )
    return batch._replace(tokens=written, counted=counted, source=Source(read, document))


def _before(mask: Tensor) -> Tensor:
    """(B, S) the value at the place before, False at the first."""
    return pad(mask[:, :-1], (1, 0))


def _same_document_before(document: Tensor) -> Tensor:
    return pad(document[:, 1:] == document[:, :-1], (1, 0))


def _has_begun(counted: Tensor, document: Tensor) -> Tensor:
    """(B, S) whether this place or one before it in its document has a counted target."""
    places = torch.arange(counted.shape[1], device=counted.device)
    start = torch.where(_same_document_before(document), 0, places).cummax(1).values  # where its document starts
    seen = counted.long().cumsum(1)
    return seen > (seen - counted.long()).gather(1, start)
