"""Variable-length attention refuses what it does not compute."""

from typing import Any

import pytest
import torch
from torch import nn

from raylava.models.attention import varlen_attention

PACK = torch.rand(1, 2, 6, 4)
STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)


def attend(**settings: Any) -> torch.Tensor:
    return varlen_attention(nn.Identity(), PACK, PACK, PACK, None, 0.5, cu_seqlens=STARTS, **settings)[0]


@pytest.mark.parametrize("settings", [{"softcap": 50.0}, {"sliding_window": 8}, {"dropout": 0.1}], ids=str)
def test_setting_that_would_be_ignored_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=f"does not support {next(iter(settings))}, which Identity requests"):
        attend(**settings)


def test_settings_that_are_not_in_force_are_accepted() -> None:
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 3]])
    result = attend(softcap=None, sliding_window=None, dropout=0.0, position_ids=position_ids, use_cache=False)
    assert torch.equal(result, attend())
