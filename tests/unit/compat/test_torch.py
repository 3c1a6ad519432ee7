"""The private parts of torch that raylava uses exist and do what the feature that uses them needs."""

from torch import nn

from raylava.compat.torch import is_compiled


def test_compiled_module_is_told_from_a_plain_one() -> None:
    """Symbol: nn.Module._compiled_call_impl. `compile` only wraps; nothing is compiled before the first call."""
    module = nn.Linear(2, 2)
    assert not is_compiled(module)
    module.compile()
    assert is_compiled(module)
