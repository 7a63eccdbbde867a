import pytest
import torch

from tests.models.zoo import tiny
from tlk.hf import call, execution
from tlk.hf.call import Inexpressible
from tlk.hf.execution import Execution, Optimized, optimized_class
from tlk.optimize import optimize


def test_the_class_is_made_once_and_keeps_its_name():
    base = type(tiny("llama"))
    cls = optimized_class(base)
    assert cls is optimized_class(base) is optimized_class(cls)
    assert (cls.__name__, cls.__module__, cls.__qualname__) == (
        base.__name__,
        base.__module__,
        base.__qualname__,
    )
    assert issubclass(cls, base) and issubclass(cls, Optimized)


def test_decode_in_generate_examines_nothing(monkeypatch):
    """Of transformers' loop the prefill reads mask and positions back, once; decode steps do not."""
    model = optimize(tiny("llama"))
    seen = []
    examine = call._examine
    monkeypatch.setattr(call, "_examine", lambda *a: seen.append(a) or examine(*a))
    ids = torch.randint(1, 99, (2, 5))
    kwargs = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    model.generate(ids, return_dict_in_generate=True, **kwargs)
    assert len(seen) == 1


def test_a_refusal_is_not_tried_again_at_every_call(monkeypatch):
    tries = []
    binds = execution.bind
    monkeypatch.setattr(execution, "bind", lambda *a: tries.append(a) or binds(*a))
    state, model = Execution(), tiny("llama").double()
    for _ in range(2):
        with pytest.raises(Inexpressible, match="float64"):
            state.ready(model)
    assert "float64" in state.refused and state.binding is None and len(tries) == 1
