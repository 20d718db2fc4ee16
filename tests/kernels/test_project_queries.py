"""project_queries: index heads and gates against the formula in float64."""

import itertools
from typing import Any

import pytest
import torch
from flashmemory_kernels.project_queries import project_queries
from flashmemory_kernels.project_queries.cases import CASES, ProjectCase, make_inputs

# Sums of at most 4,608 products in float32, of results of about one.
TOL_FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_heads_and_gates_follow_the_formula(case: ProjectCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    heads, gates = project_queries(*inputs)
    assert heads.shape == (case.num_tokens, case.num_layers, case.num_heads, case.width)
    assert gates.shape == (case.num_tokens, case.num_layers, case.num_heads)
    wide = [tensor.double() for tensor in inputs[1:-1]]
    for token, layer in itertools.product(range(case.num_tokens), range(case.num_layers)):
        spread, down, norm, up, gate, gate_bias = (tensor[layer] for tensor in wide)
        scaled = inputs.queries[token, layer].double().flatten() / spread
        hidden = torch.cat((scaled, scaled.abs())) @ down
        hidden = hidden / (hidden.square().mean() + inputs.eps).sqrt() * norm
        torch.testing.assert_close(heads[token, layer].double().flatten(), hidden @ up, **TOL_FP32)
        torch.testing.assert_close(gates[token, layer].double(), hidden @ gate + gate_bias, **TOL_FP32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spread": torch.ones(3, 63)}, r"spread: expected shape \[3, 64\], got \[3, 63\]"),
        ({"down": torch.ones(3, 64, 12)}, r"down: expected shape \[3, 128, \*\], got \[3, 64, 12\]"),
        ({"norm": torch.ones(3, 11)}, r"norm: expected shape \[3, 12\]"),
        ({"up": torch.ones(3, 12, 61)}, r"up: expected a multiple of 3 columns, got 61"),
        ({"up": torch.ones(3, 60, 12).mT}, r"up: expected a contiguous tensor"),
        ({"gate": torch.ones(3, 12, 3).double()}, r"gate: expected dtype torch.float32, got torch.float64"),
        ({"gate_bias": torch.ones(3, 4)}, r"gate_bias: expected shape \[3, 3\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project_queries(*make_inputs(CASES[1])._replace(**change))  # type: ignore[arg-type]
