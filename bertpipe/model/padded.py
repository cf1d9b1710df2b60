"""Encoding for families whose attention can't be plugged: the stock model runs on padded blocks, one a length.

The packed row is cut into the blocks of `attention.layout`, sequences of about one length together, each block goes
through the whole model as an ordinary padded batch, and the hidden states are laid back into the row. So objectives,
heads and pooling see what they see of every other family.
"""

from __future__ import annotations

from typing import Any

import torch

from bertpipe.model import attention

NAME = "padded"


def encode(model: Any, batch: Any, first_position: int, token_types: bool, autocast: bool) -> torch.Tensor:
    """Hidden states [T, H] of a PackedBatch.

    Args:
        model: a stock model, with or without a head, as `from_pretrained` gives it.
        batch: the packed row.
        first_position: position number of a sequence's first token.
        token_types: whether the model takes token_type_ids.
        autocast: False computes in fp32 whatever the surrounding autocast says.
    """
    plan = attention.layout(batch.cu_seqlens)
    fields = {"input_ids": batch.input_ids, "position_ids": batch.position_ids + first_position}
    if token_types:
        fields["token_type_ids"] = batch.token_type_ids
    spread = {name: row[0].index_select(0, plan.spread) for name, row in fields.items()}
    outputs = []
    for block in plan.blocks:
        shape, last = (block.num, block.length), block.first + block.num * block.length
        mask = plan.spread.new_ones(shape) if block.hidden is None else (~block.hidden[:, 0, 0]).long()
        inputs = {name: rows[block.first : last].view(shape) for name, rows in spread.items()}
        with torch.autocast(mask.device.type, enabled=autocast and torch.is_autocast_enabled(mask.device.type)):
            hidden = model.base_model(attention_mask=mask, **inputs).last_hidden_state
        outputs.append(hidden.flatten(0, 1))
    return attention.collect(torch.cat(outputs), plan)
